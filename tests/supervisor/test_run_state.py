"""The ranks of the next launch: from the newest good checkpoint, never from the event log."""

import pytest

from hpc_absa.errors import UsageError
from hpc_absa.rundir import RunDir
from hpc_absa.supervisor import run_state
from hpc_absa.supervisor.program import JobProgram
from hpc_absa.supervisor.run_state import RestartCounter
from tests.supervisor.digits import digits, save

OWN = "{method='tests.schedules.test_own:Faulty', base_batch=32, max_batch=128, start=96}"


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path).create()


def test_a_finished_run_says_what_differs_and_is_continued_only_with_an_allowed_change(run):
    JobProgram(digits()).write(run)
    save(run, 10, global_batch=32)
    run.log.append("phase_start", 1)
    run.log.append("done", 1, steps=10)
    assert run_state.finished(run)
    longer = digits("train.epochs=50")
    with pytest.raises(UsageError, match=r"train\.epochs = .* there, 50 here"):
        JobProgram(longer).require_same(run)
    JobProgram(longer, ("train.epochs",)).require_same(run)
    assert JobProgram(longer, ("train.epochs",)).differs(run)
    assert not JobProgram(digits(), ("train.epochs",)).differs(run)
    run.log.append("phase_start", 1)  # and it is being continued
    assert not run_state.finished(run)


def next_ranks(job, run, limit):
    return run_state.next_ranks(JobProgram(job), run, limit)


@pytest.mark.parametrize(
    ("schedule", "ranks"),
    [
        ("{method='bl', base_batch=32, max_batch=128}", 4),
        ("{method='fb', base_batch=32, max_batch=128}", 4),
        ("{method='absa', base_batch=32, max_batch=128}", 1),
        ("{method='steps', base_batch=64, batches='0:64 10K:128'}", 2),
        (OWN, 3),
    ],
)
def test_a_new_run_has_ranks_for_the_initial_batch_of_its_schedule(run, schedule, ranks):
    assert next_ranks(digits(f"schedule={schedule}"), run, 8) == ranks


def test_the_ranks_in_the_checkpoint_are_used_as_written(run):
    """A batch of 128 could use four ranks."""
    save(run, 10, global_batch=128, next_ranks=2, rank_limit=8)
    assert next_ranks(digits(), run, 8) == 2


def test_with_another_limit_the_ranks_follow_from_the_saved_batch(run):
    save(run, 10, global_batch=128, next_ranks=2, rank_limit=2)
    assert next_ranks(digits(), run, 8) == 4
    assert next_ranks(digits(), run, 3) == 2


def test_a_checkpoint_of_an_earlier_version_has_only_the_batch(run):
    save(run, 10, global_batch=128)
    assert next_ranks(digits(), run, 8) == 4


def test_the_user_may_raise_the_initial_ranks_of_a_saved_run(run):
    save(run, 10, global_batch=32, next_ranks=1, rank_limit=8)
    assert next_ranks(digits("ranks.initial=2"), run, 8) == 2


@pytest.mark.parametrize("written", [True, False], ids=["with ranks", "earlier version"])
def test_where_log_and_checkpoint_disagree_the_checkpoint_decides(run, written):
    """The newest checkpoint is damaged: its growth to 128 is lost, but is still in the log."""
    ranks = ({"next_ranks": n, "rank_limit": 8} if written else {} for n in (2, 4))
    save(run, 10, global_batch=64, **next(ranks))
    newest = save(run, 20, global_batch=128, **next(ranks))
    run.log.append("decision", 1, step=20, global_batch=64, next_batch=128, next_ranks=4)
    run.log.append("phase_end", 1, step=20, outcome="resize", next_ranks=4)
    assert next_ranks(digits(), run, 8) == 4
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    assert next_ranks(digits(), run, 8) == 2


def test_events_without_any_checkpoint_are_not_used(run):
    run.log.append("phase_start", 1, global_batch=64)
    run.log.append("decision", 1, batch=64, next_batch=128)
    assert next_ranks(digits(), run, 8) == 1


def test_restarts_are_counted_from_the_last_progress(run):
    counter = RestartCounter(run)
    assert [counter.add(), counter.add()] == [1, 2]
    save(run, 10)
    assert [counter.add(), counter.add()] == [1, 2]
