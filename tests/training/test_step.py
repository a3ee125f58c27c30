import copy

import numpy as np
import pytest
import torch
from torch import nn

from hpc_absa.comm import SerialCommunicator
from hpc_absa.data.batches import Microbatch
from hpc_absa.training.clock import Clock
from hpc_absa.training.norms import MicrobatchNorms
from hpc_absa.training.reduction import Overlapped, Reproducible
from hpc_absa.training.statistics import RunningStatistics
from hpc_absa.training.step import Adversary, Flags, Numerics, Stepper

NONE = np.empty(0, np.int64)


def feed(count, b=4):
    torch.manual_seed(3)
    return [
        Microbatch(torch.randn(b, 5), torch.randint(0, 3, (b,)), NONE, NONE) for _ in range(count)
    ]


def model(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


def stepper(net, reduction=Overlapped, adversary=None, seed=0):
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return Stepper(
        net,
        loss,
        optimizer,
        RunningStatistics(net),
        reduction(net, SerialCommunicator()),
        adversary,
        Clock(),
        seed,
    )


def take(net, batches, *, start=0, divisor=None, fraction=0.0, reduction=Overlapped, **more):
    steps = range(start, start + len(batches))
    return stepper(net, reduction, **more).take(
        steps,
        iter(batches),
        divisor=divisor or len(batches),
        lr=0.1,
        adversarial_fraction=fraction,
        steps_before=0,
        flags=Flags(),
    )


@pytest.mark.parametrize("reduction", [Overlapped, Reproducible])
def test_accumulated_microbatches_are_one_step_of_the_global_batch(reduction):
    batches = feed(6)
    ours, theirs = model(), model()
    result = take(ours, batches, reduction=reduction)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    inputs, targets = (torch.cat([getattr(b, k) for b in batches]) for k in ("inputs", "targets"))
    loss = nn.functional.cross_entropy(theirs(inputs), targets)
    loss.backward()
    optimizer.step()
    assert result.samples == 24
    assert result.loss == pytest.approx(24 * loss.item(), rel=1e-5)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", [Overlapped, Reproducible])
def test_a_cut_step_gives_each_sample_the_weight_it_has_in_a_full_one(reduction):
    batches = feed(2)
    cut, full = model(), model()
    before = copy.deepcopy(list(cut.parameters()))
    take(cut, batches, divisor=4, reduction=reduction)
    take(full, batches, reduction=reduction)
    for p, c, f in zip(before, cut.parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(c - p, (f - p) / 2, rtol=1e-4, atol=1e-7)


def test_dropout_is_a_function_of_seed_and_place_in_the_stream():
    batches = feed(1)
    first, same, elsewhere = model(0.5), model(0.5), model(0.5)
    take(first, batches, start=7)
    torch.manual_seed(99)
    take(same, batches, start=7)
    take(elsewhere, batches, start=8)
    assert torch.equal(first[0].weight, same[0].weight)
    assert not torch.equal(first[0].weight, elsewhere[0].weight)


def test_flags_and_unused_parameters_travel_with_the_step():
    net = model()
    net.unused = nn.Parameter(torch.ones(2))
    outcome = stepper(net).take(
        range(1),
        iter(feed(1)),
        divisor=1,
        lr=0.1,
        adversarial_fraction=0.0,
        steps_before=0,
        flags=Flags(stop=1, written=1),
    )
    assert outcome.flags == Flags(stop=1, written=1)
    assert torch.equal(net.unused, torch.ones(2))


def test_a_fraction_of_each_microbatch_becomes_adversarial():
    seen = []

    class Recording(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model()

        def forward(self, x):
            if self.training:
                seen.append(x.detach())
            return self.inner(x)

    batch = feed(1, b=8)
    wide = (torch.full((1, 1), -9.0), torch.full((1, 1), 9.0))
    take(Recording(), batch, fraction=0.25, adversary=Adversary(torch.tensor(0.1), wide))
    moved = (seen[-1] - batch[0].inputs).abs()
    assert torch.allclose(moved[:2].amax(dim=1), torch.tensor([0.1, 0.1]), atol=1e-6)
    assert torch.equal(moved[2:], torch.zeros(6, 5))


@pytest.mark.parametrize("reduction", [Overlapped, Reproducible])
@pytest.mark.parametrize("divisor", [3, 5])
def test_squares_are_those_of_each_microbatch_s_own_gradient_and_of_their_mean(reduction, divisor):
    batches = feed(3)
    apart = []
    for batch in batches:
        net = model()
        nn.functional.cross_entropy(net(batch.inputs), batch.targets).backward()
        apart.append(torch.cat([p.grad.reshape(-1) for p in net.parameters()]))
    found = stepper(model(), reduction).take(
        range(3),
        iter(batches),
        divisor=divisor,
        lr=0.1,
        adversarial_fraction=0.0,
        steps_before=0,
        flags=Flags(),
        wants_squares=True,
    )
    assert found.squares.microbatches == 3
    each = torch.stack([gradient.square().sum() for gradient in apart]).mean()
    assert found.squares.each == pytest.approx(each.item(), rel=1e-5)
    mean = torch.stack(apart).mean(dim=0).square().sum()
    assert found.squares.mean == pytest.approx(mean.item(), rel=1e-5)


def test_squares_are_not_measured_unasked():
    assert take(model(), feed(2)).squares is None


def test_other_backward_passes_leave_the_squares_alone():
    """Adversarial gradients and Hessian-vector products come by the same hooks."""
    net = model()
    norms = MicrobatchNorms(net)
    norms.active = True
    total = torch.zeros(())
    loss = net(feed(1)[0].inputs).square().mean()
    torch.autograd.grad(loss, list(net.parameters()))
    assert total == 0
    with norms.collecting(total):
        net(feed(1)[0].inputs).square().mean().backward()
    assert total > 0
    kept = total.clone()
    net(feed(1)[0].inputs).square().mean().backward()
    assert total == kept


def test_adversarial_examples_that_do_not_move_change_nothing():
    """With ε = 0 the pass that makes them leaves weights, statistics and dropout masks alone."""
    nets = []
    for adversary in (None, Adversary(torch.tensor(0.0), (torch.tensor(-9.0), torch.tensor(9.0)))):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
        )
        take(net, feed(2), fraction=0.5, adversary=adversary)
        nets.append(net.state_dict())
    for name, tensor in nets[0].items():
        assert torch.equal(tensor, nets[1][name]), name


@pytest.mark.parametrize(("fraction", "count"), [(0.29, 29), (0.2, 20), (0.999, 99), (1.0, 100)])
def test_the_share_is_whole_samples_rounded_down(fraction, count):
    seen = []

    class Recording(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model()

        def forward(self, x):
            seen.append((self.training, len(x)))
            return self.inner(x)

    wide = (torch.tensor(-9.0), torch.tensor(9.0))
    take(
        Recording(),
        feed(1, b=100),
        fraction=fraction,
        adversary=Adversary(torch.tensor(0.1), wide),
    )
    assert seen == [(False, count), (True, 100)]


def test_the_time_of_adversarial_examples_is_their_own():
    net = model()
    of = stepper(net, adversary=Adversary(torch.tensor(0.1), (torch.tensor(-9.0),) * 2))
    of.take(
        range(1),
        iter(feed(1)),
        divisor=1,
        lr=0.1,
        adversarial_fraction=0.5,
        steps_before=0,
        flags=Flags(),
    )
    seconds = of._clock.seconds()
    assert seconds["adversarial"] > 0
    assert seconds["comp"] > 0


# Options of the job


def moved(max_grad_norm, batches, lr=0.1):
    """How far one step moves the weights, and the gradient's own norm."""
    net, whole = model(), model()
    before = torch.cat([p.detach().clone().reshape(-1) for p in net.parameters()])
    of = Stepper(
        net,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(net.parameters(), lr=lr),
        RunningStatistics(net),
        Overlapped(net, SerialCommunicator()),
        None,
        Clock(),
        0,
        Numerics(max_grad_norm=max_grad_norm),
    )
    of.take(
        range(len(batches)),
        iter(batches),
        divisor=len(batches),
        lr=lr,
        adversarial_fraction=0.0,
        steps_before=0,
        flags=Flags(),
    )
    for batch in batches:
        loss = nn.functional.cross_entropy(whole(batch.inputs), batch.targets)
        (loss / len(batches)).backward()
    norm = torch.cat([p.grad.reshape(-1) for p in whole.parameters()]).norm()
    after = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    return (after - before).norm() / lr, norm


@pytest.mark.parametrize("share", [0.1, 0.9, 2.0])
def test_the_gradient_of_the_whole_step_is_clipped(share):
    """Of the sum over microbatches, not of each: theirs are longer."""
    batches = feed(4)
    _, norm = moved(None, batches)
    length, _ = moved(share * norm.item(), batches)
    assert length.item() == pytest.approx(min(1.0, share) * norm.item(), rel=1e-4)


def test_mixed_precision_computes_in_bfloat16_and_keeps_float32():
    seen = []

    class Recording(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model()

        def forward(self, x):
            outputs = self.inner(x)
            seen.append(outputs.dtype)
            return outputs

    def loss(outputs, targets):
        seen.append(outputs.dtype)
        return nn.functional.cross_entropy(outputs, targets)

    net, batch = Recording(), feed(1)
    of = Stepper(
        net,
        loss,
        torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
        RunningStatistics(net),
        Overlapped(net, SerialCommunicator()),
        None,
        Clock(),
        0,
        Numerics(autocast=True),
    )
    found = of.take(
        range(1),
        iter(batch),
        divisor=1,
        lr=0.1,
        adversarial_fraction=0.0,
        steps_before=0,
        flags=Flags(),
    )
    assert seen == [torch.bfloat16, torch.float32]
    assert {p.dtype for p in net.parameters()} == {p.grad.dtype for p in net.parameters()}
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    plain = take(model(), batch)
    assert found.loss == pytest.approx(plain.loss, rel=0.02)
    assert found.loss != plain.loss
