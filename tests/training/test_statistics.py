import pytest
import torch
from torch import nn

from hpc_absa.training.statistics import RunningStatistics


def net(momentum=0.1):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, momentum=momentum), nn.Flatten(), nn.Linear(108, 2)
    )


def batches(count):
    torch.manual_seed(1)
    return [torch.randn(8, 1, 8, 8) * (1 + k) + k for k in range(count)]


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_one_microbatch_a_step_is_pytorchs_own_update(momentum):
    ours, theirs = net(momentum), net(momentum)
    statistics = RunningStatistics(ours)
    for step, inputs in enumerate(batches(4)):
        total = statistics.sum_buffer()
        with statistics.collecting(total):
            ours(inputs)
        statistics.update(total, 1, step)
        theirs(inputs)
    torch.testing.assert_close(ours[1].running_mean, theirs[1].running_mean)
    torch.testing.assert_close(ours[1].running_var, theirs[1].running_var)
    assert ours[1].num_batches_tracked == theirs[1].num_batches_tracked == 4


def test_a_steps_statistics_do_not_depend_on_who_computed_which_microbatch():
    inputs = batches(4)
    whole, split = net(), [net(), net()]
    statistics = RunningStatistics(whole)
    total = statistics.sum_buffer()
    for batch in inputs:
        with statistics.collecting(total):
            whole(batch)
    statistics.update(total, 4, 0)

    ranks = [RunningStatistics(model) for model in split]
    shares = [rank.sum_buffer() for rank in ranks]
    for rank, (statistics_of, share) in enumerate(zip(ranks, shares, strict=True)):
        for batch in inputs[2 * rank : 2 * rank + 2]:
            with statistics_of.collecting(share):
                split[rank](batch)
    for statistics_of in ranks:
        statistics_of.update(shares[0] + shares[1], 4, 0)
    for model in split:
        torch.testing.assert_close(model[1].running_mean, whole[1].running_mean)
        torch.testing.assert_close(model[1].running_var, whole[1].running_var)


def test_a_forward_pass_outside_a_step_sees_the_running_statistics_and_leaves_them():
    model = net()
    statistics = RunningStatistics(model)
    total = statistics.sum_buffer()
    with statistics.collecting(total):
        model(batches(1)[0])
    before = model[1].running_mean.clone()
    assert torch.equal(before, torch.zeros(3)), "collecting must not touch the running mean"
    model.eval()(batches(1)[0])
    assert torch.equal(model[1].running_mean, before)
    assert model[1].momentum == 0.1


def test_restoring_a_state_reaches_the_flat_statistics():
    model = net()
    statistics = RunningStatistics(model)
    state = {k: torch.full_like(v, 3) for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    total = statistics.sum_buffer()
    statistics.update(total, 1, 3)
    assert torch.allclose(model[1].running_mean, torch.full((3,), 2.7))
    assert model[1].num_batches_tracked == 4


def test_a_model_without_batch_norm_has_nothing_to_agree_on():
    statistics = RunningStatistics(nn.Linear(2, 2))
    total = statistics.sum_buffer()
    assert total.numel() == 0
    statistics.update(total, 3, 0)
