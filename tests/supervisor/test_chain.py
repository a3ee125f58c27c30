"""Every link once, whoever submits it, wherever they are killed."""

import multiprocessing
import os
import signal

import pytest

from hpc_absa.errors import ExitStatus, UsageError
from hpc_absa.rundir import RunDir
from hpc_absa.supervisor import cancel, follow
from hpc_absa.supervisor.chain import Chain, Link
from hpc_absa.supervisor.link import LinkRun
from hpc_absa.supervisor.slurm import Slurm
from hpc_absa.supervisor.standing import standing
from tests.supervisor.digits import PATH, digits


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run").create()
    run.job.write_text(PATH.read_text())
    return run


def submit(run, number=1):
    return Chain(run, "digits").submit(number, "#!/bin/sh\n", 1, 1, Slurm())


def test_many_submitters_submit_once(slurm, run):
    slurm.says("sbatch", "sleep 0.2; echo 17")
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=submit, args=(run,)) for _ in range(6)]
    for other in others:
        other.start()
    for other in others:
        other.join()
        assert other.exitcode == 0
    assert len(slurm.asked("sbatch")) == 1
    assert Chain(run, "digits").last().job_id == "17"
    assert len([e for e in run.log.read() if e["event"] == "link"]) == 1


def test_a_job_that_is_in_the_queue_under_the_links_name_is_the_link(slurm, run):
    """Submitted, and its submitter killed before it could say so."""
    name = Chain(run, "digits").name(1)
    slurm.says("squeue", f"echo '23|{name}|PENDING|Priority|1'; echo '24|{name}0|RUNNING|None|1'")
    assert submit(run).job_id == "23"
    assert slurm.asked("sbatch") == []


def test_a_link_of_that_name_that_ended_is_not(slurm, run):
    slurm.says("squeue", f"echo '23|{Chain(run, 'digits').name(1)}|CANCELLED|None|1'")
    assert submit(run).job_id == "17"


def test_the_next_link_begins_when_the_last_one_has_ended(slurm, run):
    submit(run)
    slurm.says("sbatch", "echo 18")
    submit(run, 2)
    assert slurm.asked("sbatch")[1].startswith("--parsable --dependency=afterany:17 ")


def test_the_first_on_record_counts(run):
    chain = Chain(run, "digits")
    mine = Link(1, "x", "5", 1, 1, 0.0)
    other = Link(1, "x", "6", 1, 1, 0.0)
    assert chain.record(mine) == mine
    assert chain.record(other) == mine


def test_runs_in_other_folders_have_other_names(tmp_path):
    names = {Chain(RunDir(tmp_path / x), "a job/1").name(1) for x in "ab"}
    assert len(names) == 2
    assert all(name.startswith("a_job_1-") for name in names)


def test_only_the_last_life_of_a_job_owns_the_chain(slurm, run):
    chain = Chain(run, "digits")
    submit(run)
    chain.own("17", 0)
    assert chain.owned_by("17", 0)
    chain.own("17", 1)
    assert not chain.owned_by("17", 0)


# A link's end


@pytest.fixture
def link(slurm, run, monkeypatch):
    """Job 17 as link 1, on one task, with a batch that feeds four."""
    submit(run)
    for name, value in (("JOB_ID", "17"), ("NTASKS", "1"), ("JOB_NUM_NODES", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_JOB_PARTITION", raising=False)
    run.log.append("decision", 1, next_batch=128)
    said = []
    found = LinkRun(run, 1, (), said.append)
    found.said = said
    Chain(run, "digits").own("17", 0)
    slurm.says("sbatch", "echo 18")
    return found


def ended(run):
    return [e for e in run.log.read() if e.get("action") == "ended"][-1]


def test_after_a_decision_the_next_link_is_larger(link, run, slurm):
    run.log.append("phase_end", 1, outcome="resize")
    assert link._hand_over(ExitStatus.OK, None) == ExitStatus.OK
    assert Chain(run, "digits").link(2).ranks == 4
    assert (ended(run)["outcome"], ended(run)["next_job"]) == ("resize", "18")


def test_where_slurm_refuses_more_the_same_size_goes_on(link, run, slurm):
    slurm.says(
        "sbatch",
        f'if [ $(ls {run.chain}/*.json | wc -l) = 1 ] && grep -q "ntasks=4" {run.chain}/0002.sh;'
        "then echo 'sbatch: error: Node count specification invalid' >&2; exit 1; fi; echo 18",
    )
    run.log.append("phase_end", 1, outcome="resize")
    assert link._hand_over(ExitStatus.OK, None) == ExitStatus.OK
    assert Chain(run, "digits").link(2).ranks == 1
    assert "accumulating on what there is" in link.said[0]
    # and the next link does not ask for it again
    assert link._most(link._partition()) == 3


def test_where_slurm_refuses_all_the_chain_fails_with_its_words(link, run, slurm):
    slurm.says("sbatch", "echo 'sbatch: error: Invalid account' >&2; exit 1")
    run.log.append("phase_end", 1, outcome="resize")
    with pytest.raises(UsageError, match="Invalid account"):
        link._hand_over(ExitStatus.OK, None)
    assert ended(run)["outcome"] == "failed"


@pytest.mark.parametrize(
    ("status", "number", "outcome"),
    [
        (ExitStatus.STOPPED, signal.SIGUSR1, "time"),
        (ExitStatus.STOPPED, signal.SIGTERM, "terminated"),
        (ExitStatus.STOPPED, None, "stopped"),
        (ExitStatus.FAILED, None, "failed"),
    ],
)
def test_who_goes_on_depends_on_who_stopped_it(link, run, slurm, status, number, outcome):
    run.log.append("phase_end", 1, outcome="stopped")
    link._hand_over(status, number)
    assert ended(run)["outcome"] == outcome
    assert bool(Chain(run, "digits").link(2)) is (outcome == "time")


def test_terminated_in_the_grace_time_of_a_preemption_it_goes_on(link, run, slurm):
    partitions = slurm.bin.joinpath("scontrol").read_text().splitlines()[-1]
    slurm.says(
        "scontrol",
        f'if [ "$2" = job ]; then echo "JobState=RUNNING PreemptTime=now"; else {partitions}; fi',
    )
    run.log.append("phase_end", 1, outcome="stopped")
    link._hand_over(ExitStatus.STOPPED, signal.SIGTERM)
    assert ended(run)["outcome"] == "time"


def test_a_former_life_submits_nothing(link, run, slurm):
    Chain(run, "digits").own("17", 1)
    run.log.append("phase_end", 1, outcome="resize")
    assert link._hand_over(ExitStatus.OK, None) == ExitStatus.STOPPED
    assert not Chain(run, "digits").link(2)


def test_a_cancelled_chain_ends(link, run, slurm):
    Chain(run, "digits").cancel()
    run.log.append("phase_end", 1, outcome="resize")
    assert link._hand_over(ExitStatus.OK, None) == ExitStatus.STOPPED
    assert ended(run)["outcome"] == "cancelled"


def test_limits_too_short_for_a_step_end_the_chain(link, run, slurm):
    for _ in range(3):
        Chain(run, "digits").tell(link._link, "ended", outcome="time", step=0)
    run.log.append("phase_end", 1, outcome="stopped")
    assert link._hand_over(ExitStatus.STOPPED, signal.SIGUSR1) == ExitStatus.FAILED
    assert "no step within the time limit" in ended(run)["reason"]


@pytest.mark.parametrize(
    ("arrange", "words"),
    [
        (lambda run: run.log.append("done", 1, steps=3), "the run is done"),
        (lambda run: Chain(run, "digits").cancel(), "the chain was cancelled"),
        (
            lambda run: Chain(run, "digits").record(Link(2, "x", "18", 1, 1, 0.0)),
            "the next link has been submitted",
        ),
    ],
)
def test_a_job_with_nothing_to_do_leaves(link, run, arrange, words):
    arrange(run)
    assert link.work() == ExitStatus.OK
    assert words in link.said[0]


# Watching and cancelling


def test_a_dry_run_shows_submission_and_script(slurm, tmp_path):
    run = RunDir(tmp_path / "new")
    shown = follow.Follower(digits("launch.launcher=slurm"), run, ()).dry()
    first, rest = shown.split("\n", 1)
    assert first == f"sbatch --parsable {run.link_script(1)}"
    assert rest.startswith("#!/bin/bash\n")
    assert not run.path.exists()
    assert slurm.asked("sbatch") == []


def test_cancel_takes_jobs_from_the_queue_and_asks_those_at_work(slurm, run):
    name = Chain(run, "digits").prefix
    slurm.says("squeue", f"echo '7|{name}1|RUNNING|None|1'; echo '8|{name}2|PENDING|x|1'")
    run.chain.mkdir()
    told = list(cancel.cancel(run.path, now=False))
    assert slurm.asked("scancel") == ["8"]
    assert "job 7" in told[0]
    assert "asked to save and end" in told[0]
    assert run.stop_request.exists()
    assert Chain(run, "digits").cancelled
    list(cancel.cancel(run.path, now=True))
    assert slurm.asked("scancel") == ["8", "7", "8"]


def test_cancel_without_a_chain_asks_by_a_file(run):
    (told,) = cancel.cancel(run.path, now=False)
    assert "asked to save and stop" in told
    assert run.stop_request.exists()
    run.log.append("done", 1, steps=3)
    with pytest.raises(UsageError, match="nothing to cancel"):
        list(cancel.cancel(run.path, now=False))
    with pytest.raises(UsageError, match="not a run directory"):
        list(cancel.cancel(run.path / "none", now=False))


def test_a_folder_whose_job_waits_is_not_removed(slurm, run):
    submit(run)
    slurm.says("squeue", f"echo '17|{Chain(run, 'digits').name(1)}|PENDING|Priority|1'")
    follower = follow.Follower(digits("launch.launcher=slurm"), run, ())
    with pytest.raises(UsageError, match="its job 17 waits or works; first hpc-absa cancel"):
        follower.refuse_if_at_work()


def test_where_the_links_stand(slurm, run, monkeypatch, tmp_path):
    submit(run)
    name = Chain(run, "digits").name(1)
    slurm.says("squeue", f"echo '17|{name}|PENDING|Resources|1'")
    (link,) = standing(run, "digits", run.log.read())
    assert (link.state, link.waits_for, link.alive) == ("pending", "Resources", True)
    monkeypatch.setenv("PATH", str(tmp_path))
    (link,) = standing(run, "digits", run.log.read())
    assert (link.state, link.alive) == ("submitted", None)
    assert os.environ["PATH"] == str(tmp_path)
