"""Running statistics of batch norm: PyTorch's own on one rank, and equal on all ranks."""

import pytest
import torch
from torch import nn

from hpc_absa.training.batchnorm import RunningStatistics


def net(momentum=0.1):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, momentum=momentum), nn.Flatten(), nn.Linear(108, 2)
    )


def microbatches(count):
    torch.manual_seed(1)
    return [torch.randn(8, 1, 8, 8) * (1 + k) + k for k in range(count)]


def collected(model, statistics, inputs):
    """The sum over forward passes of `model`."""
    total = torch.zeros(statistics.size)
    for microbatch in inputs:
        with statistics.collecting(total):
            model(microbatch)
    return total


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_with_one_microbatch_per_step_the_update_is_that_of_pytorch(momentum):
    ours, theirs = net(momentum), net(momentum)
    statistics = RunningStatistics(ours)
    for step, inputs in enumerate(microbatches(4)):
        statistics.update(collected(ours, statistics, [inputs]), 1, step)
        theirs(inputs)
    torch.testing.assert_close(ours[1].running_mean, theirs[1].running_mean)
    torch.testing.assert_close(ours[1].running_var, theirs[1].running_var)
    assert ours[1].num_batches_tracked == theirs[1].num_batches_tracked == 4


def test_statistics_do_not_depend_on_which_rank_computed_a_microbatch():
    inputs = microbatches(4)
    one_rank, two_ranks = net(), [net(), net()]
    statistics = RunningStatistics(one_rank)
    statistics.update(collected(one_rank, statistics, inputs), 4, 0)
    ranks = [RunningStatistics(model) for model in two_ranks]
    sums = [
        collected(model, rank, inputs[2 * index : 2 * index + 2])
        for index, (model, rank) in enumerate(zip(two_ranks, ranks, strict=True))
    ]
    for model, rank in zip(two_ranks, ranks, strict=True):
        rank.update(sums[0] + sums[1], 4, 0)
        torch.testing.assert_close(model[1].running_mean, one_rank[1].running_mean)
        torch.testing.assert_close(model[1].running_var, one_rank[1].running_var)


def test_a_forward_pass_outside_a_step_uses_the_running_statistics_and_keeps_them():
    model = net()
    statistics = RunningStatistics(model)
    collected(model, statistics, microbatches(1))
    before = model[1].running_mean.clone()
    assert torch.equal(before, torch.zeros(3)), "collecting must not change the running mean"
    model.eval()(microbatches(1)[0])
    assert torch.equal(model[1].running_mean, before)
    assert model[1].momentum == 0.1


def test_a_loaded_state_dict_reaches_the_flat_statistics():
    model = net()
    statistics = RunningStatistics(model)
    model.load_state_dict({k: torch.full_like(v, 3) for k, v in model.state_dict().items()})
    statistics.update(torch.zeros(statistics.size), 1, 3)
    assert torch.allclose(model[1].running_mean, torch.full((3,), 2.7))
    assert model[1].num_batches_tracked == 4


def test_a_model_without_batch_norm_has_no_statistics():
    statistics = RunningStatistics(nn.Linear(2, 2))
    assert statistics.size == 0
    statistics.update(torch.zeros(0), 3, 0)
