"""Jobs with data, losses and metrics of any kind, trained in this process."""

import math
import re

import pytest
import torch

from hpc_absa.errors import CollectiveError, ExitStatus, UsageError
from tests.data import kinds
from tests.training import runs
from tests.training.runs import events, state_bits

KINDS = "tests.data.kinds"

JOBS = {  # with the metrics that are measured by default
    "text": (["model.name={k}:LanguageModel"], ["perplexity", "accuracy"]),
    "regression": (["model.name={k}:perceptron", "train.loss=mse"], ["mse"]),
    "multi_label": (
        ["model={{name = '{k}:perceptron', outputs = 3}}", "train.loss=bce_with_logits"],
        ["f1", "accuracy"],
    ),
    "array_regression": (["model.name={k}:perceptron", "train.loss=mse"], ["mse"]),
    "array_labels": (
        ["model={{name = '{k}:perceptron', outputs = 3}}", "train.loss=bce_with_logits"],
        ["f1", "accuracy"],
    ),
    "pairs": (["model.name={k}:TwoInputs", "train.loss={k}:reconstruction"], []),
    "without_test": (["model.name={k}:perceptron", "train.loss=huber"], []),
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def changes(name, *more):
    """Overrides of the small job: batches of 4, growing to 8 and 16 samples."""
    own = [override.format(k=KINDS) for override in JOBS[name][0]]
    schedule = "{method = 'abs', base_batch = 4, max_batch = 16, kappa = 1}"
    return [
        f"data={{name = '{KINDS}:{name}'}}",
        "train={epochs = 3, microbatch = 4, lr = 0.02, threads_per_rank = 1}",
        f"schedule={schedule}",
        "hessian.samples=16",
        *(["model={name = ''}"] if own[0].startswith("model.name") else []),
        *own,
        *more,
    ]


@pytest.mark.parametrize("name", JOBS)
def test_it_trains_grows_and_is_measured(tmp_path, name):
    trainer = runs.trainer(tmp_path, *changes(name))
    assert trainer.train().kind == "done"
    assert [e["next_batch"] for e in events(tmp_path, "decision")] == [8, 16, 16]
    assert all(math.isfinite(e["eigenvalue"]) for e in events(tmp_path, "decision")[:2])
    epochs = events(tmp_path, "epoch")
    assert [list(e["metrics"]) for e in epochs] == [JOBS[name][1]] * 3
    for epoch in epochs:
        assert epoch["test_accuracy"] == epoch["metrics"].get("accuracy")
        assert (epoch["test_loss"] is None) == (name == "without_test")
        assert math.isfinite(epoch["train_loss"])
    if name == "regression":
        assert epochs[-1]["metrics"]["mse"] == pytest.approx(epochs[-1]["test_loss"], rel=1e-5)
    if name == "text":
        assert epochs[-1]["metrics"]["perplexity"] == pytest.approx(
            math.exp(epochs[-1]["test_loss"]), rel=1e-5
        )
    console = trainer.run.log._console.getvalue()
    assert re.search({"text": r"test perplexity \d", "multi_label": r"test f1 \d+\.\d+%",
                      "regression": r"test mse \d", "pairs": r"test loss \d"}.get(name, "done"),
                     console)  # fmt: skip
    assert "test accuracy" not in console


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "loss",
            r"model and loss on samples \d+, .* failed: IndexError: Target 9 is .* bounds",
        ),
        (
            "__getitem__",
            r"reading sample \d+ of the train set failed: AttributeError: .* \(.*kinds",
        ),
    ],
)
def test_an_error_of_the_users_code_while_training_names_the_samples(
    tmp_path, monkeypatch, method, message
):
    trainer = runs.trainer(tmp_path, *changes("text"))
    if method == "loss":
        trainer.loss = lambda *_: torch.nn.functional.cross_entropy(
            torch.zeros(1, 2), torch.tensor([9])
        )
    else:
        monkeypatch.setattr(kinds.Text, "__getitem__", lambda text, index: text.lost)
    with pytest.raises(UsageError, match=message):
        trainer.train_step(trainer.run.next())


@pytest.mark.parametrize("name", ["text"])
def test_the_loss_of_tokens_is_divided_by_their_number(tmp_path, name):
    """Of an epoch with a learning rate that changes nothing, over microbatches of 4 lines."""
    trainer = runs.trainer(
        tmp_path, *changes(name, "train.lr=1e-30", "train.drop_last=true", "train.epochs=1")
    )
    model = trainer.model
    used = torch.cat([torch.from_numpy(trainer.loader.samples(k)[0]) for k in range(10)])
    trainer.train()
    (epoch,) = events(tmp_path, "epoch")
    for part, indices, loss in (
        ("train", used.tolist(), epoch["train_loss"]),
        ("test", range(kinds.TEST), epoch["test_loss"]),
    ):
        dataset = getattr(kinds.text(), part)
        inputs, targets = kinds.pad([dataset[index] for index in indices])
        with torch.no_grad():
            scores = model.eval()(inputs).flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(scores, targets.flatten()).item()
        assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stopped_run_continues_with_the_same_bits(tmp_path, workers):
    job = changes("text", "train.optimizer=adamw", "train.reproducible=true")
    whole = runs.trainer(tmp_path / "whole", *job)
    whole.train()
    stop = runs.Stop()
    trainer = runs.trainer(tmp_path / "parts", *job, f"data.workers={workers}", stop=stop)
    get = trainer.loader.get

    def get_and_stop(k, then=()):
        stop.now |= k == 13
        return get(k, then)

    trainer.loader.get = get_and_stop
    assert trainer.train().kind == "stopped"
    resumed = runs.trainer(tmp_path / "parts", *job, f"data.workers={1 - workers}")
    resumed.train()
    assert state_bits(resumed.run.state) == state_bits(whole.run.state)
    torch.use_deterministic_algorithms(False)


def test_metrics_by_name_and_function_and_the_first_is_shown(tmp_path):
    names = f"['top2', '{KINDS}:largest']"
    trainer = runs.trainer(
        tmp_path, *changes("text", "train.epochs=1", "train.metrics=['top2', 'f1']")
    )
    trainer.train()
    (epoch,) = events(tmp_path, "epoch")
    assert list(epoch["metrics"]) == ["top2", "f1"]
    assert epoch["test_accuracy"] is None
    assert "test top2 " in trainer.run.log._console.getvalue()
    with pytest.raises(CollectiveError, match=r"top2: the outputs are a dict, expected a tensor"):
        runs.train(tmp_path / "b", *changes("pairs", f"train.metrics={names}"))


def test_adversarial_examples_of_any_float_input_within_its_range(tmp_path):
    absa = "schedule={method = 'absa', base_batch = 4, max_batch = 8, ratio = 1.0, epsilon = 0.3}"
    trainer = runs.trainer(
        tmp_path,
        *changes("text", absa),
        f"data={{name = '{KINDS}:augmented'}}",
        "data.input_range=[-0.1, 1.0]",
        f"model={{name = '{KINDS}:perceptron', outputs = 5}}",
        "train.loss=mse",
    )
    microbatch = trainer.loader.get(0)
    moved = trainer.perturbed(microbatch, 1.0)[:, :4]
    inputs = microbatch.inputs[:, :4]
    assert (moved - inputs).abs().max() == pytest.approx(0.3)
    assert moved.min() == pytest.approx(-0.1)
    assert moved.max() <= 1.0
    assert trainer.train().kind == "done"


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        (
            "text",
            ["schedule.method=absa"],
            "schedule.ratio: adversarial examples need inputs of floating point, these are torch.i",
        ),
        ("text", ["train.loss=mse"], r"mse: outputs .* and targets .*, expected equal shapes"),
        ("regression", ["train.loss=cross_entropy"], r"train.loss = 'cross_entropy'"),
        (
            "array_regression",
            ["train.loss=cross_entropy"],
            r"cross_entropy: targets are torch.float32 \[4\], expected classes",
        ),
        ("regression", ["loss.delta=2"], r"loss.delta: mse has no such argument; it takes none"),
        ("text", ["loss.ignore_index='x'"], r"loss.ignore_index = 'x': expected a number"),
        ("text", ["data.flip=true"], r"data.flip = True: expected none, because .* returned"),
        ("text", ["data.train_samples=9"], r"data.train_samples = 9: expected none, because .* r"),
        ("text", ["data.normalize=false"], r"data.normalize = False: expected none, because .* re"),
        ("text", ["train.microbatch=64", "schedule.base_batch=64", "schedule.max_batch=64"],
         r"train.microbatch = 64: expected at most the 41 training samples"),
        ("text", ["train.loss=no:such"], r'train.loss: no module "no"'),
        ("text", ["train.metrics=['no:such']"], r'train.metrics: no module "no"'),
        (
            "regression",
            ["train.loss=bce_with_logits"],
            r"bce_with_logits': targets are from -\d+ to \d+, expected 0 and 1",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_the_first_step(tmp_path, name, more, message):
    with pytest.raises(CollectiveError, match=message) as error:
        runs.train(tmp_path, *changes(name, *more))
    assert error.value.status == ExitStatus.USAGE
    assert "\n" not in str(error.value)
    assert not events(tmp_path, "epoch")
