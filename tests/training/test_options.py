"""Options of `[train]` as the live objects they become."""

import numpy as np
import pytest
import torch
from torch import nn

from hpc_absa import config
from hpc_absa.data.prepare import prepare
from hpc_absa.plan import course_of
from hpc_absa.progress import Position
from hpc_absa.records import ScheduleState
from hpc_absa.training.assembly import _groups
from hpc_absa.training.material import build_batches, build_model_and_loss
from hpc_absa.training.saving import HostCopies, _with_arrays
from hpc_absa.training.state import Live, Progress, restore, scalars, tensors

JOB = """
name = "a"
data = { name = "digits" }
model = { name = "digits-cnn", width = 4 }
train = { epochs = 1, microbatch = 32, lr = 0.1, weight_decay = 0.01 }
schedule = { method = "bl", base_batch = 32 }
"""


def job(*words):
    return config.parse(JOB, "test", words)


@pytest.fixture(name="dataset", scope="module")
def _dataset(tmp_path_factory):
    return prepare("digits", None, {}, tmp_path_factory.mktemp("data") / "digits.h5")


def test_weight_decay_reaches_everything_unless_vectors_are_spared():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 3))
    net[2].weight.requires_grad = False

    def decay(*words):
        return {
            id(p): group["weight_decay"]
            for group in _groups(job(*words), net)
            for p in group["params"]
        }

    named = dict(net.named_parameters())
    trained = {id(p) for name, p in named.items() if name != "2.weight"}
    assert decay() == dict.fromkeys(trained, 0.01)
    spared = decay("train.no_decay_norm_bias=true")
    assert spared.keys() == trained
    assert {name for name, p in named.items() if spared.get(id(p))} == {"0.weight"}


def test_label_smoothing_is_that_of_the_loss(dataset):
    outputs, targets = torch.randn(6, 10), torch.arange(6)
    for words, smoothing in (((), 0.0), (("train.label_smoothing=0.1",), 0.1)):
        _, loss = build_model_and_loss(job(*words), dataset, torch.device("cpu"))
        wanted = nn.functional.cross_entropy(outputs, targets, label_smoothing=smoothing)
        assert loss(outputs, targets) == wanted


def test_channels_last_holds_for_weights_and_pictures_and_changes_no_value(dataset):
    nets, pictures = [], []
    for words in ((), ("train.channels_last=true",)):
        of = job(*words)
        course = course_of(of, len(dataset.train.labels))
        batches = build_batches(of, dataset, course, torch.device("cpu"))
        nets.append(build_model_and_loss(of, dataset, torch.device("cpu"))[0])
        pictures.append(batches.microbatch(3).inputs)
    last = torch.channels_last
    assert pictures[1].is_contiguous(memory_format=last)
    kernels = [net.features[3].weight for net in nets]
    assert [k.is_contiguous(memory_format=last) for k in kernels] == [False, True]
    assert torch.equal(*kernels)
    assert torch.equal(*pictures)
    torch.testing.assert_close(nets[0](pictures[0]), nets[1](pictures[1]))


def test_a_checkpoint_does_not_know_of_channels_last(dataset):
    """Saved from one layout, restored into the other; momentum follows its parameter's."""

    def live(*words):
        net, _ = build_model_and_loss(job(*words), dataset, torch.device("cpu"))
        return Live(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), None)

    one = live("train.channels_last=true")
    one.model(torch.randn(4, 1, 8, 8)).square().mean().backward()
    one.optimizer.step()
    progress = Progress(Position(), ScheduleState(32, 0.1))
    content = _with_arrays(scalars(progress, 0, "d", "t"), HostCopies().take(tensors(one)))
    for words in ((), ("train.channels_last=true",)):
        other, _ = restore(content, live(*words), "x")
        for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
            ours = one.optimizer.state[p]["momentum_buffer"]
            theirs = other.optimizer.state[q]["momentum_buffer"]
            assert torch.equal(p, q)
            assert torch.equal(ours, theirs)
            assert theirs.stride() == q.stride()
    assert all(isinstance(array, np.ndarray) for array in content.arrays().values())
