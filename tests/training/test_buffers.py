"""Buffers: PyTorch's own results on one rank, and equal on all ranks."""

import copy

import pytest
import torch
from torch import nn

from hpc_absa.comm import SerialCommunicator
from hpc_absa.data.order import microbatch_seed
from hpc_absa.progress import Step
from hpc_absa.training.buffers import Collected, ModelBuffers
from hpc_absa.training.clock import Clock
from hpc_absa.training.reduction import OverlappedReduction, ReproducibleReduction
from hpc_absa.training.step import StepEngine
from hpc_absa.training.sums import Flags
from tests.training import random_models


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def net(momentum=0.1):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, momentum=momentum), nn.Flatten(), nn.Linear(108, 2)
    )


def microbatches(count):
    torch.manual_seed(1)
    return [torch.randn(8, 1, 8, 8) * (1 + k) + k for k in range(count)]


def collected(model, buffers, inputs):
    """What forward passes of `model` on these microbatches change."""
    lane = Collected(torch.zeros(buffers.size))
    for microbatch in inputs:
        with buffers.collecting(lane):
            model(microbatch)
    return lane


def update(buffers, lanes, microbatches):
    """As after a step: the lanes are those of all ranks."""
    total = sum(lane.flat for lane in lanes)
    changed = buffers.changed(total)
    values = sum(buffers.values(lane, changed) for lane in lanes) if changed else None
    buffers.update(total, microbatches, changed, values)


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_with_one_microbatch_per_step_the_update_is_that_of_pytorch(momentum):
    ours, theirs = net(momentum), net(momentum)
    statistics = ModelBuffers(ours)
    for inputs in microbatches(4):
        update(statistics, [collected(ours, statistics, [inputs])], 1)
        theirs(inputs)
    torch.testing.assert_close(ours[1].running_mean, theirs[1].running_mean)
    torch.testing.assert_close(ours[1].running_var, theirs[1].running_var)
    assert ours[1].num_batches_tracked == theirs[1].num_batches_tracked == 4


def test_statistics_do_not_depend_on_which_rank_computed_a_microbatch():
    inputs = microbatches(4)
    one_rank, two_ranks = net(), [net(), net()]
    statistics = ModelBuffers(one_rank)
    update(statistics, [collected(one_rank, statistics, inputs)], 4)
    ranks = [ModelBuffers(model) for model in two_ranks]
    sums = [
        collected(model, rank, inputs[2 * index : 2 * index + 2])
        for index, (model, rank) in enumerate(zip(two_ranks, ranks, strict=True))
    ]
    for model, rank in zip(two_ranks, ranks, strict=True):
        update(rank, sums, 4)
        torch.testing.assert_close(model[1].running_mean, one_rank[1].running_mean)
        torch.testing.assert_close(model[1].running_var, one_rank[1].running_var)


def test_a_forward_pass_outside_a_step_uses_the_running_statistics_and_keeps_them():
    model = net()
    statistics = ModelBuffers(model)
    collected(model, statistics, microbatches(1))
    before = model[1].running_mean.clone()
    assert torch.equal(before, torch.zeros(3)), "collecting must not change the running mean"
    model.eval()(microbatches(1)[0])
    assert torch.equal(model[1].running_mean, before)
    assert model[1].momentum == 0.1


def test_a_copy_of_the_model_has_statistics_of_its_own():
    """Such as a network that an average of the weights is made of."""
    model, theirs = net(), net()
    statistics = ModelBuffers(model)
    copied, inputs = copy.deepcopy(model), microbatches(1)[0]
    lane = collected(copied, statistics, [inputs])
    assert not lane.flat.any()
    theirs(inputs)
    torch.testing.assert_close(copied.state_dict(), theirs.state_dict())


def test_a_loaded_state_dict_reaches_the_flat_statistics():
    model = net()
    statistics = ModelBuffers(model)
    model.load_state_dict({k: torch.full_like(v, 3) for k, v in model.state_dict().items()})
    inputs = microbatches(1)[0]
    theirs = net()
    theirs.load_state_dict(model.state_dict())
    update(statistics, [collected(model, statistics, [inputs])], 1)
    theirs(inputs)
    torch.testing.assert_close(model.state_dict(), theirs.state_dict())


def test_statistics_of_a_model_that_is_moved_away_and_back_between_steps():
    ours, theirs = net(), net()
    statistics = ModelBuffers(ours)
    for inputs in microbatches(3):
        update(statistics, [collected(ours, statistics, [inputs])], 1)
        theirs(inputs)
        ours.double().float()  # as .cpu() and .cuda() do, it replaces the buffers
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_statistics_keep_their_type_where_the_default_type_is_another_one():
    model = net()
    torch.set_default_dtype(torch.float64)
    try:
        ModelBuffers(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert model[1].running_mean.dtype == torch.float32


def test_a_model_without_batch_norm_has_no_statistics():
    statistics = ModelBuffers(nn.Linear(2, 2))
    assert statistics.size == 0
    update(statistics, [Collected(torch.zeros(0))], 3)


# Random models, against a plain loop of PyTorch


def ours(model, steps, lr, comm=None, reduction=OverlappedReduction):
    """The same steps with the engine, on the ranks of `comm`."""
    engine = StepEngine(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9),
        reduction(model, comm or SerialCommunicator()),
        seed=0,
        clock=Clock(),
    )
    index = 0
    for batches in steps:
        step = engine.begin(
            Step(index, index + len(batches)),
            divisor=len(batches),
            lr=lr,
            flags=Flags(),
        )
        for k in step.microbatches:
            inputs, targets = batches[k - index]
            with step.forward():
                loss = nn.functional.cross_entropy(model(inputs), targets)
            step.backward(loss, samples=len(targets))
        step.optimize()
        index += len(batches)
    return model


def require_same_as_plain_loop(names, seed, per_step, dtype, reduction=OverlappedReduction):
    model, plain = (random_models.build(seed, names).to(dtype) for _ in range(2))
    steps = random_models.data(4, per_step, dtype=dtype)
    ours(model, steps, 0.05, reduction=reduction)
    random_models.plain_loop(plain, steps, 0.05, lambda k: microbatch_seed(0, k))
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {}
    if dtype == torch.float32:
        tolerance = {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_step", [1, 3])
@pytest.mark.parametrize("name", random_models.LAYERS)
def test_each_layer_ends_as_in_a_plain_loop(name, per_step, dtype):
    require_same_as_plain_loop(["conv", name, "conv"], 1, per_step, dtype)


@pytest.mark.parametrize("other", ["instance norm", "batch norm", "twice", "reentrant"])
def test_layers_beside_each_other_end_as_in_a_plain_loop(other):
    """In float32, where their statistics are parts of one tensor."""
    names = ["conv", "batch norm", other, "conv"]
    require_same_as_plain_loop(names, 1, 3, torch.float32)


@pytest.mark.parametrize("seed", range(12))
def test_random_models_end_as_in_a_plain_loop(seed):
    reduction = (OverlappedReduction, ReproducibleReduction)[seed % 2]
    require_same_as_plain_loop(None, seed, 1 + seed % 3, torch.float64, reduction)


def transformed(how):
    model = random_models.build(1, ["conv", "batch norm", "moving average", "conv"]).double()
    return {
        "compiled": lambda: torch.compile(model, backend="eager"),
        "compiled in place": lambda: model.compile(backend="eager") or model,
        "scripted": lambda: torch.jit.script(random_models.build(1, ["batch norm"]).double()),
    }[how]()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("how", ["compiled", "compiled in place", "scripted"])
def test_compiled_and_scripted_models_end_as_in_a_plain_loop(how):
    names = (
        ["batch norm"] if how == "scripted" else ["conv", "batch norm", "moving average", "conv"]
    )
    model, plain = transformed(how), random_models.build(1, names).double()
    steps = random_models.data(3, 3, dtype=torch.float64)
    ours(model, steps, 0.05)
    random_models.plain_loop(plain, steps, 0.05, lambda k: microbatch_seed(0, k))
    state = {k.removeprefix("_orig_mod."): v for k, v in model.state_dict().items()}
    torch.testing.assert_close(state, dict(plain.state_dict()), rtol=1e-9, atol=1e-12)


def test_passes_outside_of_a_step_leave_no_trace():
    """Also in training mode, and in what an evaluation changes."""
    names = ["batch norm", "cumulative", "moving average", "through .data", "spectral norm"]
    model = random_models.build(2, names)
    buffers = ModelBuffers(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    inputs, _ = random_models.data(1, 1)[0][0]
    model(inputs)
    model.eval()
    with torch.no_grad():
        model(inputs)
    model[3].calls += 5
    buffers.restore()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
