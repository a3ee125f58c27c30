"""Each link is submitted once, whoever submits it and whenever that process is killed."""

import multiprocessing
import os
import signal
import time

import pytest

from hpc_absa.errors import ExitStatus, UsageError
from hpc_absa.rundir import RunDir
from hpc_absa.supervisor.chain import Chain, Link, chain_status
from hpc_absa.supervisor.follower import Follower
from hpc_absa.supervisor.link import LinkRun
from hpc_absa.supervisor.program import JobProgram
from hpc_absa.supervisor.run_state import cancel
from hpc_absa.supervisor.slurm import Slurm
from tests.supervisor.digits import PATH, digits, save


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run").create()
    run.write_job(PATH.read_text())
    return run


def submit(run, number=1):
    return Chain(run, "digits").submit(number, "#!/bin/sh\n", 1, 1, Slurm())


def test_many_submitters_submit_once(slurm, run):
    slurm.respond("sbatch", "sleep 0.2; echo 17")
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=submit, args=(run,)) for _ in range(6)]
    for other in others:
        other.start()
    for other in others:
        other.join()
        assert other.exitcode == 0
    assert len(slurm.calls("sbatch")) == 1
    assert Chain(run, "digits").last().job_id == "17"
    assert len([e for e in run.log.read() if e["event"] == "link"]) == 1


def test_a_queued_job_with_the_name_of_the_link_is_the_link(slurm, run):
    """Submitted, and its submitter killed before it could record the job."""
    name = Chain(run, "digits").name(1)
    slurm.respond(
        "squeue", f"echo '23|{name}|PENDING|Priority|1'; echo '24|{name}0|RUNNING|None|1'"
    )
    assert submit(run).job_id == "23"
    assert slurm.calls("sbatch") == []


def test_an_ended_job_with_that_name_is_not_the_link(slurm, run):
    slurm.respond("squeue", f"echo '23|{Chain(run, 'digits').name(1)}|CANCELLED|None|1'")
    assert submit(run).job_id == "17"


def test_the_next_link_starts_when_the_last_one_has_ended(slurm, run):
    submit(run)
    slurm.respond("sbatch", "echo 18")
    submit(run, 2)
    assert slurm.calls("sbatch")[1].startswith("--parsable --dependency=afterany:17 ")


def test_the_first_job_on_record_is_the_link(run):
    chain = Chain(run, "digits")
    first, second = (Link(1, "x", job_id, 1, 1, 0.0) for job_id in "56")
    assert chain.record(first) == first
    assert chain.record(second) == first


def test_runs_in_other_folders_have_other_names(tmp_path):
    names = {Chain(RunDir(tmp_path / x), "a job/1").name(1) for x in "ab"}
    assert len(names) == 2
    assert all(name.startswith("a_job_1-") for name in names)


def test_only_the_last_attempt_of_a_job_owns_the_chain(slurm, run):
    chain = Chain(run, "digits")
    submit(run)
    chain.take_over("17", 0)
    assert chain.owned_by("17", 0)
    chain.take_over("17", 1)
    assert not chain.owned_by("17", 0)


# A link's end


@pytest.fixture
def link(slurm, run, monkeypatch):
    """Job 17 as link 1, on one task, with a saved batch that feeds four."""
    submit(run)
    for name, value in (("JOB_ID", "17"), ("NTASKS", "1"), ("JOB_NUM_NODES", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_JOB_PARTITION", raising=False)
    save(run, 10, global_batch=128)
    lines = []
    link = LinkRun(run, 1, (), lines.append)
    link.lines = lines
    Chain(run, "digits").take_over("17", 0)
    slurm.respond("sbatch", "echo 18")
    return link


def ended(run):
    return [e for e in run.log.read() if e.get("action") == "ended"][-1]


def test_after_a_decision_the_next_link_is_larger(link, run, slurm):
    run.log.append("phase_end", 1, outcome="resize")
    assert link._hand_over(ExitStatus.OK, None) == ExitStatus.OK
    assert Chain(run, "digits").link(2).ranks == 4
    assert (ended(run)["outcome"], ended(run)["next_job"]) == ("resize", "18")


def test_the_next_link_has_the_ranks_in_the_checkpoint(link, run, slurm):
    """A batch of 128 could use all four ranks of the partition."""
    save(run, 20, global_batch=128, next_ranks=2, rank_limit=link._limit(link._partition()))
    run.log.append("phase_end", 1, outcome="resize")
    link._hand_over(ExitStatus.OK, None)
    assert Chain(run, "digits").link(2).ranks == 2


def test_where_slurm_refuses_a_larger_job_the_next_one_has_the_same_size(link, run, slurm):
    slurm.respond(
        "sbatch",
        f'if [ $(ls {run.chain}/*.json | wc -l) = 1 ] && grep -q "ntasks=4" {run.chain}/0002.sh;'
        "then echo 'sbatch: error: Node count specification invalid' >&2; exit 1; fi; echo 18",
    )
    run.log.append("phase_end", 1, outcome="resize")
    assert link._hand_over(ExitStatus.OK, None) == ExitStatus.OK
    assert Chain(run, "digits").link(2).ranks == 1
    assert "gradients are accumulated instead" in link.lines[0]
    # and the next link does not request it again
    assert link._limit(link._partition()) == 3


def test_where_slurm_refuses_every_size_the_chain_fails_with_its_message(link, run, slurm):
    slurm.respond("sbatch", "echo 'sbatch: error: Invalid account' >&2; exit 1")
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
def test_whether_the_chain_continues_depends_on_what_stopped_the_link(
    link, run, slurm, status, number, outcome
):
    run.log.append("phase_end", 1, outcome="stopped")
    link._hand_over(status, number)
    assert ended(run)["outcome"] == outcome
    assert bool(Chain(run, "digits").link(2)) is (outcome == "time")


@pytest.mark.parametrize(("number", "outcome"), [(signal.SIGUSR1, "time"), (None, "stopped")])
def test_a_job_whose_ranks_began_no_phase_did_not_ask_for_more(link, run, number, outcome):
    run.log.append("phase_end", 1, outcome="resize")  # in the job before
    Chain(run, "digits").log(link._link, "started")
    link._hand_over(ExitStatus.STOPPED, number)
    assert ended(run)["outcome"] == outcome


def test_terminated_in_the_grace_time_of_a_preemption_the_chain_continues(link, run, slurm):
    partitions = slurm.bin.joinpath("scontrol").read_text().splitlines()[-1]
    slurm.respond(
        "scontrol",
        f'if [ "$2" = job ]; then echo "JobState=RUNNING PreemptTime=now"; else {partitions}; fi',
    )
    run.log.append("phase_end", 1, outcome="stopped")
    link._hand_over(ExitStatus.STOPPED, signal.SIGTERM)
    assert ended(run)["outcome"] == "time"


def test_an_earlier_attempt_submits_nothing(link, run, slurm):
    Chain(run, "digits").take_over("17", 1)
    run.log.append("phase_end", 1, outcome="resize")
    assert link._hand_over(ExitStatus.OK, None) == ExitStatus.STOPPED
    assert not Chain(run, "digits").link(2)


def test_a_cancelled_chain_submits_nothing(link, run, slurm):
    Chain(run, "digits").cancel()
    run.log.append("phase_end", 1, outcome="resize")
    assert link._hand_over(ExitStatus.OK, None) == ExitStatus.STOPPED
    assert ended(run)["outcome"] == "cancelled"


def test_time_limits_too_short_for_a_step_end_the_chain(link, run, slurm):
    for _ in range(3):
        Chain(run, "digits").log(link._link, "ended", outcome="time", step=10)
    run.log.append("phase_end", 1, outcome="stopped")
    assert link._hand_over(ExitStatus.STOPPED, signal.SIGUSR1) == ExitStatus.FAILED
    assert "no step within the time limit" in ended(run)["reason"]


@pytest.mark.parametrize(
    ("arrange", "reason"),
    [
        (lambda run: run.log.append("done", 1, steps=3), "the run is done"),
        (lambda run: Chain(run, "digits").cancel(), "the chain was cancelled"),
        (
            lambda run: Chain(run, "digits").record(Link(2, "x", "18", 1, 1, 0.0)),
            "the next link has been submitted",
        ),
    ],
)
def test_a_job_with_nothing_to_do_exits(link, run, arrange, reason):
    arrange(run)
    assert link.work() == ExitStatus.OK
    assert reason in link.lines[0]


# Watching and cancelling


def test_a_submission_waits_for_a_slurmctld_that_does_not_answer(slurm, run, monkeypatch):
    """Also where it is asked for the partition, before the submission itself."""
    partitions = slurm.bin.joinpath("scontrol").read_text().splitlines()[-1]
    silent = "echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1"
    asked = run.path / "asked"
    slurm.respond("scontrol", f"[ -e {asked} ] || {{ touch {asked}; {silent}; }}\n{partitions}")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    Follower(JobProgram(digits("launch.launcher=slurm")), run)._submit()
    assert len(slurm.calls("scontrol")) == 2
    assert Chain(run, "digits").last().job_id == "17"


def test_a_job_that_was_cancelled_by_scancel_is_not_submitted_again(slurm, run):
    """One that disappeared without a result is."""
    submit(run)
    lines = []
    follower = Follower(JobProgram(digits("launch.launcher=slurm")), run, lines.append)
    slurm.respond("squeue", f"echo '17|{Chain(run, 'digits').name(1)}|CANCELLED|None|1'")
    assert follower._watch() == ExitStatus.STOPPED
    assert lines == ["link 1 (job 17) was cancelled; run the same command to continue"]
    slurm.respond("squeue", "")
    assert follower._watch() is None
    assert lines[1:] == ["link 1 (job 17) exited without writing a result"]


def test_that_a_job_has_saved_is_said_by_the_job_alone(slurm, run):
    submit(run)
    chain, lines = Chain(run, "digits"), []
    chain.log(chain.last(), "ended", outcome="terminated")
    follower = Follower(JobProgram(digits("launch.launcher=slurm")), run, lines.append)
    assert follower._watch() == ExitStatus.STOPPED
    assert lines == ["stopped; run the same command to continue"]


def test_a_dry_run_shows_submission_and_script(slurm, tmp_path):
    run = RunDir(tmp_path / "new")
    shown = Follower(JobProgram(digits("launch.launcher=slurm")), run).dry_run()
    first, rest = shown.split("\n", 1)
    assert first == f"sbatch --parsable {run.link_script(1)}"
    assert rest.startswith("#!/bin/bash\n")
    assert not run.path.exists()
    assert slurm.calls("sbatch") == []


def test_a_dry_run_shows_the_first_link_of_a_fresh_run(slurm, run):
    submit(run)
    save(run, 10, global_batch=128)
    follower = Follower(JobProgram(digits("launch.launcher=slurm")), run)
    assert follower.dry_run().startswith("sbatch --parsable --dependency=afterany:17 ")
    shown = follower.dry_run(fresh=True)
    assert shown.startswith(f"sbatch --parsable {run.link_script(1)}\n")
    assert "#SBATCH --ntasks=1\n" in shown


def test_cancel_removes_pending_jobs_and_asks_running_ones_to_save(slurm, run):
    name = Chain(run, "digits").prefix
    slurm.respond("squeue", f"echo '7|{name}1|RUNNING|None|1'; echo '8|{name}2|PENDING|x|1'")
    run.chain.mkdir()
    lines = list(cancel(run.path, now=False))
    assert slurm.calls("scancel") == ["8"]
    assert "job 7" in lines[0]
    assert "asked to save and exit" in lines[0]
    assert run.stop_request.exists()
    assert Chain(run, "digits").cancelled
    list(cancel(run.path, now=True))
    assert slurm.calls("scancel") == ["8", "7", "8"]


@pytest.mark.parametrize("state", ["SUSPENDED", "STOPPED", "RESIZING"])
def test_cancel_does_not_end_a_job_that_has_begun_to_run(slurm, run, state):
    slurm.respond("squeue", f"echo '7|{Chain(run, 'digits').prefix}1|{state}|None|1'")
    run.chain.mkdir()
    (line,) = cancel(run.path, now=False)
    assert "asked to save and exit" in line
    assert slurm.calls("scancel") == []


def test_cancel_reaches_a_chain_also_without_slurm_or_without_jobs(slurm, run, monkeypatch):
    run.chain.mkdir()
    (line,) = cancel(run.path, now=False)
    assert "asked to save and stop" in line
    Chain(run, "digits").resume()
    monkeypatch.setenv("PATH", str(run.path))
    (line,) = cancel(run.path, now=False)
    assert "a job that waits in the queue exits when it starts" in line
    assert Chain(run, "digits").cancelled


def test_cancel_without_a_chain_leaves_a_stop_request(run):
    (line,) = cancel(run.path, now=False)
    assert "asked to save and stop" in line
    assert run.stop_request.exists()
    run.log.append("done", 1, steps=3)
    with pytest.raises(UsageError, match="nothing to cancel"):
        list(cancel(run.path, now=False))
    with pytest.raises(UsageError, match="not a run directory"):
        list(cancel(run.path / "none", now=False))


def test_cancel_writes_nothing_into_a_folder_with_the_users_own_job_file(tmp_path):
    (tmp_path / "job.toml").write_text('name = "mine"\n')
    with pytest.raises(UsageError, match="not a run directory"):
        list(cancel(tmp_path, now=False))
    assert [path.name for path in tmp_path.iterdir()] == ["job.toml"]


def test_a_folder_with_a_pending_job_is_not_removed(slurm, run):
    submit(run)
    slurm.respond("squeue", f"echo '17|{Chain(run, 'digits').name(1)}|PENDING|Priority|1'")
    follower = Follower(JobProgram(digits("launch.launcher=slurm")), run)
    with pytest.raises(UsageError, match="its job 17 is pending or running; first hpc-absa cancel"):
        follower.refuse_if_active()


def test_the_status_of_links(slurm, run, monkeypatch, tmp_path):
    submit(run)
    name = Chain(run, "digits").name(1)
    slurm.respond("squeue", f"echo '17|{name}|PENDING|Resources|1'")
    (link,) = chain_status(run, run.log.read())
    assert (link.state, link.waits_for, link.alive) == ("pending", "Resources", True)
    monkeypatch.setenv("PATH", str(tmp_path))
    (link,) = chain_status(run, run.log.read())
    assert (link.state, link.alive) == ("submitted", None)
    assert os.environ["PATH"] == str(tmp_path)
