"""The fixed tree in one process: ranks are played by pieces of one list of lanes."""

import pytest
import torch
from torch import nn

from hpc_absa.comm import SerialCommunicator
from hpc_absa.summation import LANES
from hpc_absa.training import reduction
from hpc_absa.training.reduction import FLAGS, Overlapped, Reproducible


class Played(SerialCommunicator):
    """One of several ranks whose exchange is done by the test."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def allreduce_recursive_doubling_(self, tensor):
        self.sent = tensor.clone()
        return tensor


def local_sum(gradients, rank, size):
    """What a rank brings to the exchange, `gradients` holding one number a microbatch."""
    net = nn.Linear(1, 1, bias=False)
    comm = Played(rank, size)
    exact = Reproducible(net, comm)
    exact.begin()
    for lane in exact.lanes(range(len(gradients))):
        extra = torch.zeros(1 + FLAGS)
        for k in lane:
            with exact.backward(last=False):
                (net.weight.sum() * gradients[k]).backward()
            extra[0] += 1
        exact.end_lane(extra)
    exact.finish(torch.zeros(1 + FLAGS))
    return comm.sent


@pytest.mark.parametrize("microbatches", [1, 3, 8, 50, 64, 200])
def test_any_power_of_two_world_sums_to_the_same_bits(microbatches):
    torch.manual_seed(microbatches)
    gradients = (torch.randn(microbatches) * 10 ** torch.randn(microbatches)).tolist()
    sums = {}
    for size in (1, 2, 4, 16, LANES):
        level = [local_sum(gradients, rank, size) for rank in range(size)]
        while len(level) > 1:
            level = [a + b for a, b in zip(level[::2], level[1::2], strict=True)]
        sums[size] = level[0]
    assert sums[1][0].item() == pytest.approx(sum(gradients), rel=1e-4)
    assert sums[1][1].item() == microbatches
    for size, total in sums.items():
        assert torch.equal(total, sums[1]), f"{size} ranks sum to other bits"


def test_the_order_of_summation_matters_otherwise():
    """The property above is no accident: plain halves differ from the whole in the last bits."""
    differences = 0
    for seed in range(20):
        torch.manual_seed(seed)
        values = torch.randn(200) * 10 ** torch.randn(200)
        whole = first = second = torch.zeros(())
        for value in values:
            whole = whole + value
        for a, b in zip(values[:100], values[100:], strict=True):
            first, second = first + a, second + b
        differences += (first + second).item() != whole.item()
    assert differences


def test_both_reductions_deal_the_same_microbatches_to_a_rank():
    net = nn.Linear(1, 1)
    for size in (1, 2, 4, 8):
        for rank in range(size):
            for count in (1, 5, 8, 100):
                fast = Overlapped.__new__(Overlapped)
                fast._comm = Played(rank, size)
                exact = Reproducible(net, Played(rank, size))
                lanes = [k for lane in exact.lanes(range(count)) for k in lane]
                assert lanes == [k for lane in fast.lanes(range(count)) for k in lane]


def test_gradients_in_buckets_are_the_gradients(monkeypatch):
    """Several buckets, an unused parameter, another memory format, two passes."""
    monkeypatch.setattr(reduction, "BUCKET", 64)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2), nn.Linear(2, 2))
    net = net.to(memory_format=torch.channels_last)
    net.unused = nn.Parameter(torch.ones(3))
    inputs = torch.randn(2, 5, 3, 3, 3)
    for part in inputs:
        net(part).square().sum().backward()
    wanted = {n: p.grad for n, p in net.named_parameters()}
    overlapped = Overlapped(net, SerialCommunicator())
    for _ in range(2):
        overlapped.begin()
        for part in inputs:
            with overlapped.backward(last=False):
                net(part).square().sum().backward()
        overlapped.finish(torch.zeros(FLAGS))
        for name, parameter in net.named_parameters():
            expected = torch.zeros(3) if wanted[name] is None else wanted[name]
            assert torch.equal(parameter.grad, expected), name
            assert parameter.grad.stride() == parameter.stride()
    assert len(overlapped._buckets) > 2
    assert sum(bucket.sums.numel() for bucket in overlapped._buckets) == sum(
        parameter.numel() for parameter in net.parameters()
    )
