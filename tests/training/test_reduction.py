"""Sums over microbatches and ranks, in one process: the ranks run one after the other."""

from itertools import chain

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpc_absa.comm import SerialCommunicator
from hpc_absa.errors import MisuseError
from hpc_absa.summation import LANES
from hpc_absa.training import reduction
from hpc_absa.training.reduction import OverlappedReduction, ReproducibleReduction
from hpc_absa.training.sums import Flags, GradientNorms, StepSums


class Simulated(SerialCommunicator):
    """One of several ranks; the test adds up what they would exchange."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def allreduce_recursive_doubling_(self, tensor):
        self.sent = tensor.clone()
        return tensor


def local_sum(gradients, rank, size):
    """What a rank sends, for `gradients` of one number per microbatch: gradient, samples, flag."""
    net = nn.Linear(1, 1, bias=False)
    comm = Simulated(rank, size)
    reproducible = ReproducibleReduction(net, comm)
    reproducible.begin()
    for lane in reproducible.lanes(range(len(gradients))):
        sums = StepSums(torch.zeros(0))
        for k in lane:
            with reproducible.backward(last=False):
                (net.weight.sum() * gradients[k]).backward()
            sums.samples += 1
        reproducible.end_lane(sums, empty=not lane)
    reproducible.finish(Flags(stop=1))
    return comm.sent[[0, 4, 6]]


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
        overlapped.end_lane(StepSums(torch.ones(2)), empty=False)
        sums, flags = overlapped.finish(Flags(failed=7))
        assert (sums.buffers.flat.tolist(), flags) == ([1.0] * 2, Flags(failed=7))
        for name, parameter in net.named_parameters():
            if gradients[name] is None:
                assert parameter.grad is None, name
                continue
            assert torch.equal(parameter.grad, gradients[name]), name
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
    hooks = GradientNorms(net)
    total = StepSums(torch.zeros(0))
    torch.autograd.grad(net(inputs).square().mean(), list(net.parameters()))
    assert total.gradient_square == 0
    with hooks.measuring(total):
        net(inputs).square().mean().backward()
    squares = sum(p.grad.square().sum() for p in net.parameters())
    torch.testing.assert_close(total.gradient_square, squares)
    before = total.gradient_square
    net(inputs).square().mean().backward()
    assert total.gradient_square is before


@pytest.mark.parametrize("reentrant", [False, True])
def test_norms_are_of_whole_gradients_with_activation_checkpointing(reentrant):
    """The reentrant kind adds to the gradient of a shared layer in two backward passes."""

    def gradient(through):
        torch.manual_seed(0)
        layer = nn.Linear(5, 5)
        hooks, total = GradientNorms(layer), StepSums(torch.zeros(0))
        inputs = torch.randn(4, 5, requires_grad=True)
        with hooks.measuring(total):
            through(layer, through(layer, inputs)).square().mean().backward()
        return total.gradient_square, sum(p.grad.square().sum() for p in layer.parameters())

    squares, expected = gradient(lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant))
    torch.testing.assert_close(squares, expected)


def test_the_norm_of_a_sparse_gradient_adds_equal_indices():
    layer = nn.Embedding(4, 3, sparse=True)
    hooks, total = GradientNorms(layer), StepSums(torch.zeros(0))
    with hooks.measuring(total):
        layer(torch.tensor([1, 1, 2])).square().sum().backward()
    torch.testing.assert_close(total.gradient_square, layer.weight.grad.to_dense().square().sum())


class Sending(SerialCommunicator):
    """Two ranks of which the other one has no gradient; notes when a message is sent."""

    size = 2

    def __init__(self):
        self.sent = []

    def allreduce_async_(self, tensor, name):
        self.sent.append((name, tensor.clone()))
        return tensor

    def allreduce_list_(self, tensors, name):
        self.sent += [(f"{name}.{index}", tensor.clone()) for index, tensor in enumerate(tensors)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_gradient_is_sent_once_and_complete(reentrant, monkeypatch):
    monkeypatch.setattr(reduction, "BUCKET_BYTES", 64)
    monkeypatch.setattr(reduction, "OVERLAP_BYTES", 64)
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
        overlapped.end_lane(StepSums(torch.zeros(1)), empty=False)
        overlapped.finish(Flags())
        *others, last = overlapped._buckets
        sent = dict(comm.sent)
        assert len(sent) == len(comm.sent) == len(others) + 2
        for index, bucket in enumerate(others):
            assert torch.equal(sent[f"gradients.{index}"], bucket.sums)
        assert torch.equal(sent["last.0"], last.sums)
        comm.sent.clear()
    # After the first step the plain kind is sent within the backward pass, but for the last bucket.
    assert early == ([0, 0, 0] if reentrant else [0, 1, 1])


@pytest.mark.parametrize(
    ("widths", "early"),
    [
        ([600, 600, 600], 2),
        ([100, 600, 600], 1),
        ([100, 400, 600, 600], 2),
        ([100, 1100], 1),  # a large one, whose message takes longer than the wait
        ([100], 0),
    ],
)
def test_a_message_is_sent_early_only_with_enough_of_the_backward_pass_left(widths, early):
    """A square layer of width 512 has 1 MiB of gradients."""
    net = nn.Sequential(*(nn.Linear(width, width, bias=False) for width in widths))
    comm = Sending()
    overlapped = OverlappedReduction(net, comm)
    for _ in range(2):
        comm.sent.clear()
        overlapped.begin()
        with overlapped.backward(last=True):
            sum(layer.weight.sum() for layer in net).backward()
        before = len(comm.sent)
        overlapped.end_lane(StepSums(torch.zeros(1)), empty=False)
        overlapped.finish(Flags())
    assert before == early
    assert sum(tensor.numel() for _, tensor in comm.sent[:-1]) == sum(w * w for w in widths)


def test_another_backward_pass_is_refused_in_a_step_and_ignored_between_steps():
    net, comm = nn.Linear(5, 5), Sending()
    overlapped = OverlappedReduction(net, comm)

    def backward():
        net(torch.ones(2, 5)).sum().backward()

    for _ in range(2):
        overlapped.begin()
        with pytest.raises(MisuseError, match=r"was changed during a step"):
            backward()
        overlapped.begin()
        with overlapped.backward(last=True):
            backward()
        overlapped.end_lane(StepSums(torch.zeros(1)), empty=False)
        overlapped.finish(Flags())
        for _ in range(2):
            backward()
    assert not overlapped._repeated
