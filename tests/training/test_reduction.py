"""Sums over microbatches and ranks, in one process: the ranks run one after the other."""

from itertools import chain

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpc_absa.comm import SerialCommunicator
from hpc_absa.summation import LANES
from hpc_absa.training import reduction
from hpc_absa.training.reduction import (
    GradientHooks,
    OverlappedReduction,
    ReproducibleReduction,
)


class Simulated(SerialCommunicator):
    """One of several ranks; the test adds up what they would exchange."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def allreduce_recursive_doubling_(self, tensor):
        self.sent = tensor.clone()
        return tensor


def local_sum(gradients, rank, size):
    """What a rank sends, for `gradients` of one number per microbatch: gradient, count, flag."""
    net = nn.Linear(1, 1, bias=False)
    comm = Simulated(rank, size)
    reproducible = ReproducibleReduction(net, comm)
    reproducible.begin()
    for lane in reproducible.lanes(range(len(gradients))):
        sums = torch.zeros(1)
        for k in lane:
            with reproducible.backward(last=False):
                (net.weight.sum() * gradients[k]).backward()
            sums += 1
        reproducible.end_lane(sums if lane else None)
    reproducible.finish(torch.zeros(1), torch.ones(1))
    return comm.sent


@pytest.mark.parametrize("microbatches", [1, 3, 8, 50, 64, 200])
def test_any_power_of_two_number_of_ranks_gets_the_same_bits(microbatches):
    torch.manual_seed(microbatches)
    gradients = (torch.randn(microbatches) * 10 ** torch.randn(microbatches)).tolist()
    sums = {}
    for size in (1, 2, 4, 16, LANES):
        level = [local_sum(gradients, rank, size) for rank in range(size)]
        while len(level) > 1:
            level = [a + b for a, b in zip(level[::2], level[1::2], strict=True)]
        gradient, count, flag = level[0]
        assert (count.item(), flag.item()) == (microbatches, size)
        sums[size] = gradient
    assert sums[1].item() == pytest.approx(sum(gradients), rel=1e-4)
    assert len({gradient.item() for gradient in sums.values()}) == 1


def test_without_a_fixed_tree_the_order_of_summation_matters():
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


def test_both_reductions_give_a_rank_the_same_microbatches():
    net = nn.Linear(1, 1)
    for size in (1, 2, 4, 8):
        for rank in range(size):
            for count in (1, 5, 8, 100):
                comm, microbatches = Simulated(rank, size), range(count)
                overlapped = OverlappedReduction(net, comm).lanes(microbatches)
                reproducible = ReproducibleReduction(net, comm).lanes(microbatches)
                assert list(chain(*overlapped)) == list(chain(*reproducible))


def test_gradients_in_buckets_are_the_gradients(monkeypatch):
    """Several buckets, an unused parameter, another memory format, two passes."""
    monkeypatch.setattr(reduction, "BUCKET_BYTES", 64)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2), nn.Linear(2, 2))
    net = net.to(memory_format=torch.channels_last)
    net.unused = nn.Parameter(torch.ones(3))
    inputs = torch.randn(2, 5, 3, 3, 3)
    for part in inputs:
        net(part).square().sum().backward()
    gradients = {n: p.grad for n, p in net.named_parameters()}
    overlapped = OverlappedReduction(net, SerialCommunicator())
    for _ in range(2):
        overlapped.begin()
        for part in inputs:
            with overlapped.backward(last=False):
                net(part).square().sum().backward()
        sums, flags = overlapped.finish(torch.ones(2), torch.full((3,), 7.0))
        assert (sums.tolist(), flags.tolist()) == ([1.0] * 2, [7.0] * 3)
        for name, parameter in net.named_parameters():
            expected = torch.zeros(3) if gradients[name] is None else gradients[name]
            assert torch.equal(parameter.grad, expected), name
            assert parameter.grad.stride() == parameter.stride()
    assert len(overlapped._buckets) > 2
    assert sum(bucket.sums.numel() for bucket in overlapped._buckets) == sum(
        parameter.numel() for parameter in net.parameters()
    )


def test_norms_of_microbatches_ignore_other_backward_passes():
    """Adversarial gradients and Hessian-vector products reach the same hooks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs = torch.randn(4, 5)
    hooks = GradientHooks(net)
    total = torch.zeros(())
    torch.autograd.grad(net(inputs).square().mean(), list(net.parameters()))
    assert total == 0
    with hooks.measuring(total):
        net(inputs).square().mean().backward()
    squares = sum(p.grad.square().sum() for p in net.parameters())
    torch.testing.assert_close(total, squares)
    before = total.clone()
    with hooks.measuring(None):
        net(inputs).square().mean().backward()
    assert total == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_norms_are_of_whole_gradients_with_activation_checkpointing(reentrant):
    """The reentrant kind adds to the gradient of a shared layer in two backward passes."""

    def gradient(through):
        torch.manual_seed(0)
        layer = nn.Linear(5, 5)
        hooks, total = GradientHooks(layer), torch.zeros(())
        inputs = torch.randn(4, 5, requires_grad=True)
        with hooks.measuring(total):
            through(layer, through(layer, inputs)).square().mean().backward()
        return total, sum(p.grad.square().sum() for p in layer.parameters())

    squares, expected = gradient(lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant))
    torch.testing.assert_close(squares, expected)


class Sending(SerialCommunicator):
    """Two ranks of which the other one has no gradient; notes when a message is sent."""

    size = 2

    def __init__(self):
        self.sent = []

    def allreduce_async_(self, tensor, name):
        self.sent.append((name, tensor.clone()))
        return tensor


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_gradient_is_sent_once_and_complete(reentrant):
    torch.manual_seed(0)
    layer = nn.Linear(5, 5)
    net = nn.Sequential(layer, nn.Linear(5, 5))
    comm = Sending()
    overlapped = OverlappedReduction(net, comm)
    early = []
    for _ in range(3):
        overlapped.begin()
        inputs = torch.randn(4, 5, requires_grad=True)
        with overlapped.backward(last=True):
            x = checkpoint(layer, inputs, use_reentrant=reentrant)
            checkpoint(layer, net[1](x), use_reentrant=reentrant).square().mean().backward()
        early.append(len(comm.sent))
        overlapped.finish(torch.zeros(1), torch.zeros(1))
        sent = {name: tensor for name, tensor in comm.sent if name.startswith("gradients")}
        assert len(sent) == len(comm.sent) - 1 == len(overlapped._buckets)
        for index, bucket in enumerate(overlapped._buckets):
            assert torch.equal(sent[f"gradients.{index}"], bucket.sums)
        comm.sent.clear()
    # After the first step the plain kind is sent within the backward pass.
    assert early == ([0, 0, 0] if reentrant else [0, 1, 1])
