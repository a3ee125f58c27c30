"""One optimizer step: microbatches added up, cut steps, flags, squared norms, clipping."""

import copy

import pytest
import torch
from torch import nn

from hpc_absa.comm import SerialCommunicator
from hpc_absa.errors import MisuseError
from hpc_absa.progress import Step
from hpc_absa.training.clock import Clock
from hpc_absa.training.reduction import (
    LocalReduction,
    OverlappedReduction,
    ReproducibleReduction,
)
from hpc_absa.training.step import StepEngine
from hpc_absa.training.sums import Flags, StepSums


def local(net, comm):
    return LocalReduction(net)


REDUCTIONS = pytest.mark.parametrize(
    "reduction", [local, OverlappedReduction, ReproducibleReduction]
)


def microbatches(count, b=4):
    torch.manual_seed(3)
    return [(torch.randn(b, 5), torch.randint(0, 3, (b,))) for _ in range(count)]


def model(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


def take_step(
    net,
    batches,
    *,
    start=0,
    divisor=None,
    flags=Flags(),  # noqa: B008
    measure_squares=False,
    reduction=OverlappedReduction,
    momentum=0.9,
    max_grad_norm=None,
):
    """One step of `net` over `batches`, the first of them microbatch `start` of the stream."""
    engine = StepEngine(
        net,
        torch.optim.SGD(net.parameters(), lr=1.0, momentum=momentum),
        reduction(net, SerialCommunicator()),
        seed=0,
        clock=Clock(),
        max_grad_norm=max_grad_norm,
    )
    step = engine.begin(
        Step(start, start + len(batches)),
        divisor=divisor or len(batches),
        lr=0.1,
        flags=flags,
        measure_squares=measure_squares,
    )
    for k in step.microbatches:
        inputs, targets = batches[k - start]
        with step.forward():
            loss = nn.functional.cross_entropy(net(inputs), targets)
        step.backward(loss, samples=len(targets))
    return step.optimize()


@REDUCTIONS
def test_accumulated_microbatches_are_one_step_of_the_global_batch(reduction):
    batches = microbatches(6)
    ours, theirs = model(), model()
    result = take_step(ours, batches, reduction=reduction)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loss = nn.functional.cross_entropy(theirs(inputs), targets)
    loss.backward()
    optimizer.step()
    assert result.samples == 24
    assert result.loss == pytest.approx(24 * loss.item(), rel=1e-5)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@REDUCTIONS
def test_a_model_that_is_moved_away_and_back_between_steps(reduction):
    """As by .cpu() and .cuda(), which also replace what the gradients are in."""
    comm, (ours, theirs) = SerialCommunicator(), (model(), model())
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    engine = StepEngine(
        ours,
        torch.optim.SGD(ours.parameters(), lr=0.1),
        reduction(ours, comm),
        seed=0,
        clock=Clock(),
    )
    for index, (inputs, targets) in enumerate(microbatches(3)):
        step = engine.begin(Step(index, index + 1), divisor=1, lr=0.1, flags=Flags())
        for _ in step.microbatches:
            with step.forward():
                loss = nn.functional.cross_entropy(ours(inputs), targets)
            step.backward(loss, samples=len(targets))
        step.optimize()
        ours.double().float()
        optimizer.zero_grad()
        nn.functional.cross_entropy(theirs(inputs), targets).backward()
        optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@REDUCTIONS
def test_a_cut_step_gives_each_sample_the_weight_it_has_in_a_full_one(reduction):
    batches = microbatches(2)
    cut, full = model(), model()
    before = copy.deepcopy(list(cut.parameters()))
    take_step(cut, batches, divisor=4, reduction=reduction)
    take_step(full, batches, reduction=reduction)
    for p, c, f in zip(before, cut.parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(c - p, (f - p) / 2, rtol=1e-4, atol=1e-7)


def test_dropout_depends_on_the_seed_and_on_the_index_of_the_microbatch():
    batches = microbatches(1)
    first, same, other_index = model(0.5), model(0.5), model(0.5)
    take_step(first, batches, start=7)
    torch.manual_seed(99)
    take_step(same, batches, start=7)
    take_step(other_index, batches, start=8)
    assert torch.equal(first[0].weight, same[0].weight)
    assert not torch.equal(first[0].weight, other_index[0].weight)


@REDUCTIONS
def test_weight_decay_and_momentum_skip_a_parameter_without_a_gradient(reduction):
    """As in PyTorch, whose optimizers skip a gradient that is None."""

    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.skipped = nn.Linear(5, 3), nn.Linear(5, 3)
            self.skip = False

        def forward(self, x):
            return self.used(x) if self.skip else self.used(x) + self.skipped(x)

    torch.manual_seed(0)
    ours = Skipping()
    theirs = copy.deepcopy(ours)
    engine = StepEngine(
        ours,
        torch.optim.SGD(ours.parameters(), lr=1.0, momentum=0.9, weight_decay=0.1),
        reduction(ours, SerialCommunicator()),
        seed=0,
        clock=Clock(),
    )
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for index, (inputs, targets) in enumerate(microbatches(3)):
        ours.skip = theirs.skip = index == 1
        step = engine.begin(Step(index, index + 1), divisor=1, lr=0.1, flags=Flags())
        for _ in step.microbatches:
            with step.forward():
                loss = nn.functional.cross_entropy(ours(inputs), targets)
            step.backward(loss, samples=4)
        step.optimize()
        optimizer.zero_grad()
        nn.functional.cross_entropy(theirs(inputs), targets).backward()
        optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@REDUCTIONS
def test_flags_are_summed_with_the_step_and_unused_parameters_do_not_change(reduction):
    net = model()
    net.unused = nn.Parameter(torch.ones(2))
    result = take_step(net, microbatches(1), flags=Flags(stop=1, written=1), reduction=reduction)
    assert result.flags == Flags(stop=1, written=1)
    assert torch.equal(net.unused, torch.ones(2))


def test_flags_and_sums_are_unpacked_as_they_were_packed():
    flags = Flags(stop=1, save=2, written=3, failed=4)
    assert Flags.unpack(flags.pack(torch.zeros(1))) == flags
    sums = StepSums(torch.tensor([1.0, 2.0]))
    sums.gradient_square = torch.tensor(3.0)
    sums.add(torch.tensor(1.5), torch.tensor(2), 3)
    sums.add(torch.tensor(2.5), 3.0, 3)
    assert sums.pack().tolist() == [1, 2, 3, 4, 5, 6]
    unpacked = StepSums.unpack(sums.pack())
    assert unpacked.numbers() == sums.numbers() == (3, 4, 5, 6)
    assert unpacked.buffers.flat.tolist() == [1, 2]


@REDUCTIONS
@pytest.mark.parametrize("divisor", [3, 5])
def test_squares_are_those_of_single_microbatches_and_of_their_mean(reduction, divisor):
    batches = microbatches(3)
    gradients = []
    for inputs, targets in batches:
        net = model()
        nn.functional.cross_entropy(net(inputs), targets).backward()
        gradients.append(torch.cat([p.grad.reshape(-1) for p in net.parameters()]))
    result = take_step(model(), batches, divisor=divisor, measure_squares=True, reduction=reduction)
    assert result.squares.microbatches == 3
    each = torch.stack([gradient.square().sum() for gradient in gradients]).mean()
    assert result.squares.each == pytest.approx(each.item(), rel=1e-5)
    mean = torch.stack(gradients).mean(dim=0).square().sum()
    assert result.squares.mean == pytest.approx(mean.item(), rel=1e-5)


def test_squares_are_measured_only_on_request():
    assert take_step(model(), microbatches(2)).squares is None


@pytest.mark.parametrize("factor", [0.1, 0.9, 2.0])
def test_the_gradient_of_the_whole_step_is_clipped(factor):
    """Of the sum over microbatches, not of each: theirs are longer."""

    def change(max_grad_norm):
        net = model()
        before = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
        take_step(net, microbatches(4), momentum=0.0, max_grad_norm=max_grad_norm)
        return (nn.utils.parameters_to_vector(net.parameters()) - before).norm().item() / 0.1

    net, batches = model(), microbatches(4)
    for inputs, targets in batches:
        (nn.functional.cross_entropy(net(inputs), targets) / len(batches)).backward()
    norm = nn.utils.get_total_norm([p.grad for p in net.parameters()]).item()
    assert change(None) == pytest.approx(norm, rel=1e-4)
    assert change(factor * norm) == pytest.approx(min(1.0, factor) * norm, rel=1e-4)


# Losses with a denominator of their own


def token_batches(count, b=4, length=6):
    """Class indices [b, T] with a different number of ignored ones in each microbatch."""
    torch.manual_seed(5)
    batches = []
    for index in range(count):
        targets = torch.randint(0, 3, (b, length))
        targets[torch.rand(b, length) < index / count] = -100
        batches.append((torch.randn(b, length, 5), targets))
    return batches


def token_loss(outputs, targets):
    total = nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum")
    return total, (targets != -100).sum()


def gradient_of_all(net, batches, divisor=None):
    """`M / divisor · ∇ Σ sums / Σ denominators`, written out."""
    pairs = [token_loss(net(x), t) for x, t in batches]
    total = sum(s for s, _ in pairs) / sum(d for _, d in pairs)
    parts = torch.autograd.grad(total, list(net.parameters()))
    return [g * len(batches) / (divisor or len(batches)) for g in parts], total.item()


@REDUCTIONS
@pytest.mark.parametrize("divisor", [None, 8])
def test_a_step_divides_the_sum_over_all_microbatches_by_all_denominators(reduction, divisor):
    net, batches = model(), token_batches(5)
    expected, mean = gradient_of_all(net, batches, divisor)
    result = step_of_pairs(net, batches, reduction, divisor=divisor)
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)
    assert result.samples == 20
    assert result.denominator == sum(int((t != -100).sum()) for _, t in batches)
    assert result.loss / result.denominator == pytest.approx(mean, rel=1e-5)


def step_of_pairs(net, batches, reduction, divisor=None, loss_fn=token_loss, **options):
    engine = StepEngine(
        net,
        torch.optim.SGD(net.parameters(), lr=0.0),
        reduction(net, SerialCommunicator()),
        seed=0,
        clock=Clock(),
    )
    step = engine.begin(
        Step(0, len(batches)), divisor=divisor or len(batches), lr=0.0, flags=Flags(), **options
    )
    for k in step.microbatches:
        inputs, targets = batches[k]
        with step.forward():
            loss = loss_fn(net(inputs), targets)
        step.backward(loss, samples=len(targets))
    return step.optimize()


@REDUCTIONS
def test_a_pair_with_one_denominator_a_sample_has_the_bits_of_the_mean(reduction):
    batches = microbatches(4)
    gradients = []
    for pair in (False, True):
        net = model()

        def loss_fn(outputs, targets, pair=pair):
            mean = nn.functional.cross_entropy(outputs, targets)
            return (mean * len(targets), len(targets)) if pair else mean

        result = step_of_pairs(net, batches, reduction, loss_fn=loss_fn)
        assert result.denominator == result.samples == 16
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert torch.equal(*gradients)  # microbatches of 4 samples: the products are exact


@REDUCTIONS
def test_microbatches_without_a_target_count_for_nothing(reduction):
    batches = token_batches(3)
    batches[1][1].fill_(-100)
    net = model()
    expected, _ = gradient_of_all(net, [batches[0], batches[2]], 2)
    step_of_pairs(net, batches, reduction)
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)
    for _, targets in batches:
        targets.fill_(-100)
    result = step_of_pairs(net := model(), batches, reduction)
    assert (result.loss, result.denominator) == (0, 0)
    assert all(not p.grad.any() for p in net.parameters())


@REDUCTIONS
@pytest.mark.parametrize("number", [int, float])
def test_a_mean_over_no_target_is_left_out(reduction, number):
    """It is NaN."""
    batches = token_batches(3)
    batches[1][1].fill_(-100)

    def loss_fn(outputs, targets):
        count = number((targets != -100).sum())
        return nn.functional.cross_entropy(outputs.mT, targets) * count, count

    net = model()
    expected, _ = gradient_of_all(net, [batches[0], batches[2]], 2)
    step_of_pairs(net, batches, reduction, loss_fn=loss_fn)
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", [local, OverlappedReduction, ReproducibleReduction])
@pytest.mark.parametrize("in_place", [False, True])
def test_changing_gradients_during_a_step_is_an_error(reduction, in_place):
    net, batches = model(), microbatches(2)
    comm = SerialCommunicator()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    engine = StepEngine(net, optimizer, reduction(net, comm), seed=0, clock=Clock())
    for wrong in (0, 1):
        step = engine.begin(Step(0, 2), divisor=2, lr=0.1, flags=Flags())

        def take(step=step, wrong=wrong):
            for k in step.microbatches:
                step.backward(net(batches[k][0]).sum(), samples=4)
                if k == wrong:
                    optimizer.zero_grad(set_to_none=not in_place)
            step.optimize()

        with pytest.raises(MisuseError, match=r"\.grad was changed during a step"):
            take()


def test_squared_norms_are_of_gradients_whose_mean_is_the_step():
    net, batches = model(), token_batches(4)
    expected, _ = gradient_of_all(net, batches)
    result = step_of_pairs(net, batches, OverlappedReduction, measure_squares=True)
    assert result.squares.mean == pytest.approx(
        float(torch.cat([g.flatten() for g in expected]).square().sum()), rel=1e-4
    )
    total = sum(int((t != -100).sum()) for _, t in batches)
    each = []
    for inputs, targets in batches:
        loss, _ = token_loss(net(inputs), targets)
        parts = torch.autograd.grad(len(batches) * loss / total, list(net.parameters()))
        each.append(float(torch.cat([g.flatten() for g in parts]).square().sum()))
    assert result.squares.each == pytest.approx(sum(each) / 4, rel=1e-4)


def test_groups_keep_the_ratio_of_their_learning_rates():
    net = model()
    groups = [{"params": net[0].parameters(), "lr": 0.01}, {"params": net[3].parameters()}]
    engine = StepEngine(
        net,
        torch.optim.SGD(groups, lr=0.1),
        OverlappedReduction(net, SerialCommunicator()),
        seed=0,
        clock=Clock(),
    )
    step = engine.begin(Step(0, 1), divisor=1, lr=0.4, flags=Flags())
    for k in step.microbatches:
        with step.forward():
            loss = net(microbatches(1)[k][0]).sum()
        step.backward(loss, samples=4)
    step.optimize()
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    assert rates == pytest.approx([0.04, 0.4])


@REDUCTIONS
def test_the_sum_of_a_float16_loss_does_not_overflow(reduction):
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    engine = StepEngine(net, optimizer, reduction(net, SerialCommunicator()), seed=0, clock=Clock())
    step = engine.begin(Step(0, 1), divisor=1, lr=0.0, flags=Flags())
    for _ in step.microbatches:
        loss = (net(torch.ones(1, 5)).sum() * 0 + 600).half()
        step.backward(loss, samples=128)
    assert step.optimize().loss == 600 * 128
