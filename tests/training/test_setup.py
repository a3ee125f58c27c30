"""What a job's options become: parameter groups, loss, memory format, number of threads."""

import numpy as np
import pytest
import torch
from torch import nn

from hpc_absa import config
from hpc_absa.curvature.stratified import CANDIDATES
from hpc_absa.data.prepare import prepare
from hpc_absa.plan import stream_of
from hpc_absa.progress import Position, Progress
from hpc_absa.records import ScheduleState
from hpc_absa.training.data import Draw, build_loader, hessian_sample, hessian_samples
from hpc_absa.training.optimizer import parameter_groups
from hpc_absa.training.setup import build_model_and_loss
from hpc_absa.training.state import TrainState
from tests.checkpoint.contents import snapshot

JOB = """
name = "a"
data = { name = "digits" }
model = { name = "digits-cnn", width = 4 }
train = { epochs = 1, microbatch = 32, lr = 0.1, weight_decay = 0.01 }
schedule = { method = "bl", base_batch = 32 }
"""
CPU = torch.device("cpu")
ABS = 'schedule={ method = "abs", base_batch = 32, max_batch = 64 }'
LAYOUTS = ([], ["train.channels_last=true"])


def job(*overrides):
    return config.parse(JOB, "test", overrides)


@pytest.fixture(name="dataset", scope="module")
def _dataset(tmp_path_factory):
    return prepare("digits", None, {}, tmp_path_factory.mktemp("data") / "digits.h5")


def loader(settings, dataset):
    return build_loader(settings, dataset, stream_of(settings, len(dataset.train)), CPU)


def test_weight_decay_applies_to_all_parameters_or_excludes_vectors():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 3))
    net[2].weight.requires_grad = False

    def decay(*overrides):
        return {
            id(p): group["weight_decay"]
            for group in parameter_groups(job(*overrides).train, net)
            for p in group["params"]
        }

    named = dict(net.named_parameters())
    trained = {id(p) for name, p in named.items() if name != "2.weight"}
    assert decay() == dict.fromkeys(trained, 0.01)
    excluded = decay("train.no_decay_norm_bias=true")
    assert excluded.keys() == trained
    assert {name for name, p in named.items() if excluded.get(id(p))} == {"0.weight"}


def test_label_smoothing_is_passed_to_the_loss(dataset):
    outputs, targets = torch.randn(6, 10), torch.arange(6)
    for overrides, smoothing in (((), 0.0), (("train.label_smoothing=0.1",), 0.1)):
        _, loss = build_model_and_loss(job(*overrides), dataset, CPU)
        expected = nn.functional.cross_entropy(outputs, targets, label_smoothing=smoothing)
        assert loss(outputs, targets) == expected


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        (["data.name=mine:images"], False),
        (["data.name=mine:images", "data.flip=true"], True),
        (["data.name=mine:images", "data.padding=1"], True),
        (["data.name=imagefolder"], True),
        (["data.name=imagefolder", "data.flip=false", "data.padding=0"], False),
        (["data.name=digits"], False),
    ],
)
def test_user_defined_images_are_augmented_only_where_the_job_asks_for_it(
    dataset, overrides, changed
):
    reader = loader(job(*overrides), dataset)
    microbatch = reader.get(0)
    assert torch.equal(microbatch.inputs, reader.sample(microbatch.samples)[0]) != changed


def test_channels_last_is_the_layout_of_weights_and_images_and_changes_no_value(dataset):
    nets, images = [], []
    for overrides in LAYOUTS:
        settings = job(*overrides)
        nets.append(build_model_and_loss(settings, dataset, CPU)[0])
        images.append(loader(settings, dataset).get(3).inputs)
    last = torch.channels_last
    assert images[1].is_contiguous(memory_format=last)
    kernels = [net.features[3].weight for net in nets]
    assert [k.is_contiguous(memory_format=last) for k in kernels] == [False, True]
    assert torch.equal(*kernels)
    assert torch.equal(*images)
    torch.testing.assert_close(nets[0](images[0]), nets[1](images[1]))


def test_a_checkpoint_can_be_restored_into_the_other_memory_format(dataset):
    """The momentum has the layout of its parameter."""

    def state(overrides):
        net, _ = build_model_and_loss(job(*overrides), dataset, CPU)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        return TrainState(net, optimizer, Progress(Position(), ScheduleState(32, 0.1)))

    before = state(LAYOUTS[1])
    before.model(torch.randn(4, 1, 8, 8)).square().mean().backward()
    before.optimizer.step()
    content = before.scalars(0, "d", "t").with_arrays(snapshot(before.tensors()))
    assert all(isinstance(array, np.ndarray) for array in content.arrays().values())
    for overrides in LAYOUTS:
        after = state(overrides)
        after.restore(content, "x")
        for p, q in zip(before.model.parameters(), after.model.parameters(), strict=True):
            ours = before.optimizer.state[p]["momentum_buffer"]
            theirs = after.optimizer.state[q]["momentum_buffer"]
            assert torch.equal(p, q)
            assert torch.equal(ours, theirs)
            assert theirs.stride() == q.stride()


def test_a_smaller_hessian_sample_is_a_prefix_of_a_larger_one(dataset):
    settings = job()
    stream = stream_of(settings, len(dataset.train))
    samples = [hessian_sample(settings, loader(settings, dataset), stream, n) for n in (20, 50)]
    assert [sample.size for sample in samples] == [20, 50]
    assert np.array_equal(samples[0].indices, samples[1].indices[:20])
    inputs, targets = samples[0].load(5, 9)
    assert targets.tolist() == dataset.train.labels[samples[1].indices[5:9]].tolist()
    assert inputs.shape == (4, 1, 8, 8)
    everything = hessian_sample(settings, loader(settings, dataset), stream, 10**6)
    assert sorted(everything.indices) == list(range(stream.samples))


@pytest.mark.parametrize("fresh", [False, True])
def test_the_candidates_of_an_estimate_begin_with_its_sample(dataset, fresh):
    settings = job(ABS, "hessian.samples=20", f"hessian.fresh={str(fresh).lower()}")
    stream = stream_of(settings, len(dataset.train))
    sample_of = hessian_samples(settings, loader(settings, dataset), stream)
    first, later = sample_of(Draw(0, 0)), sample_of(Draw(1, 0))
    assert np.array_equal(first.indices, later.indices) != fresh
    candidates = first.candidates
    assert candidates.size == min(CANDIDATES * 20, stream.samples)
    assert candidates.population == len(dataset.train)
    assert np.array_equal(candidates.indices[:20], first.indices)
    assert len(set(candidates.indices)) == candidates.size
    chosen, labels = candidates.chosen(torch.tensor([7, 3])), dataset.train.labels
    assert chosen.load(0, 2)[1].tolist() == labels[candidates.indices[[7, 3]]].tolist()


def test_the_candidates_of_several_estimates_are_disjoint(dataset):
    settings = job(ABS, "hessian.samples=20", "schedule.max_estimates=3")
    stream = stream_of(settings, len(dataset.train))
    sample_of = hessian_samples(settings, loader(settings, dataset), stream)
    samples = [sample_of(Draw(0, repeat)) for repeat in range(3)]
    assert [sample.size for sample in samples] == [20] * 3
    everyone = np.concatenate([sample.candidates.indices for sample in samples])
    assert len(set(everyone)) == len(everyone)
    assert np.array_equal(sample_of(Draw(4, 1)).indices, samples[1].indices)


class OwnMode(nn.Sequential):
    """Keeps its batch norm frozen, and is built in evaluation mode."""

    def __init__(self):
        super().__init__(
            nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 10)
        )
        self.eval()

    def train(self, mode=True):
        super().train(mode)
        self[2].eval()
        return self


def test_a_model_is_put_into_training_mode_by_its_own_method(dataset):
    name = f'model={{name = "{__name__}:OwnMode"}}'
    model, _ = build_model_and_loss(job(name), dataset, CPU)
    assert [layer.training for layer in model] == [True, True, False, True, True]
    assert model.training
