"""Chains of batch jobs on a real Slurm: resized, cut short, requeued, without nodes or daemons.

After any disturbance a chain ends with the bits of the undisturbed run; no link is submitted twice.
"""

import contextlib
import os
import signal
import subprocess

import numpy as np
import pytest

from tests.mpi.jobs import final_weights
from tests.slurm.chains import ChainRun, alone
from tests.slurm.cluster import NODES, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Final weights of the small job, undisturbed."""
    return final_weights(alone(tmp_path_factory.mktemp("alone")).path)


LONG = ("train.epochs=14", "model.width=16")
"""Long enough to be disturbed in its second phase."""


@pytest.fixture(scope="module")
def long_weights(tmp_path_factory):
    """Final weights of the longer job, undisturbed."""
    return final_weights(alone(tmp_path_factory.mktemp("long"), *LONG).path)


@pytest.fixture(autouse=True)
def _nodes_are_idle(request):
    """The jobs of a test have ended before the next test begins."""
    yield
    cluster = request.getfixturevalue("cluster")
    for job in cluster.jobs():
        cluster.command("scancel", "--full", "--signal=KILL", job)
        cluster.command("scancel", job)
    wait_until(lambda: cluster.states() == dict.fromkeys(NODES, "idle"), 60, "idle nodes")


def test_a_chain_grows_from_one_node_to_four(cluster, tmp_path, weights):
    chain = ChainRun(cluster, tmp_path, most=4)
    dry = subprocess.run(
        [*chain.words, "--dry-run"], env=chain.environment, capture_output=True, text=True
    )
    code, output = chain.start().finish()
    assert code == 0, output
    assert chain.sizes() == [(1, 1), (2, 2), (4, 4)]
    assert [e["ranks"] for e in chain.events("phase_start")] == [1, 2, 4]
    assert chain.links() == [(1, "resize"), (2, "resize"), (3, "done")]
    assert len(chain.events("phase_start")[-1]["hosts"]) >= 1
    chain.assert_each_submitted_once()
    assert np.array_equal(weights, final_weights(chain.run.path))
    assert chain.run.report.exists()
    chain.assert_charged_as_in_slurms_records()
    # --dry-run had printed exactly what was executed
    script = chain.run.link_script(1)
    assert dry.stdout == f"sbatch --parsable {script}\n{script.read_text()}"
    assert not list(tmp_path.glob("run/chain/.*"))
    again = chain.start().finish(30)
    assert again[0] == 0
    assert "already done" in again[1]


def test_the_watching_command_may_be_killed_and_repeated(cluster, tmp_path, weights):
    chain = ChainRun(cluster, tmp_path).start()
    chain.wait_for("phase_start")
    chain.process.kill()
    chain.process.communicate()
    status = chain.command("status", str(chain.run.path))
    assert chain.job_of(1) in status.stdout, status
    code, output = chain.start().finish()
    assert code == 0, output
    chain.assert_each_submitted_once()
    assert np.array_equal(weights, final_weights(chain.run.path))


def test_a_crash_between_sbatch_and_the_record_submits_nothing_twice(cluster, tmp_path, weights):
    """The submitter is killed immediately after Slurm has accepted the job."""
    chain = ChainRun(cluster, tmp_path)
    real = chain.environment["PATH"]
    wrapper = tmp_path / "bin" / "sbatch"
    wrapper.parent.mkdir()
    wrapper.write_text(
        "#!/bin/sh\n"
        f'PATH="{real}"\n'
        f'if [ -e {tmp_path}/killed ]; then exec sbatch "$@"; fi\n'
        f"touch {tmp_path}/killed\n"
        'sbatch --hold "$@" && kill -KILL $PPID\n'
    )
    wrapper.chmod(0o755)
    chain.environment["PATH"] = f"{wrapper.parent}:{real}"
    code, _ = chain.start().finish(60)
    assert code == -signal.SIGKILL
    assert not list(chain.run.chain.glob("*.json")), "the record came before the crash"
    (job,) = cluster.jobs()
    chain.start()
    wait_until(lambda: chain.events("link"), 30, "the record of the first link")
    assert chain.job_of(1) == job
    cluster.command("scontrol", "release", job)
    code, output = chain.finish()
    assert code == 0, output
    chain.assert_each_submitted_once()
    assert np.array_equal(weights, final_weights(chain.run.path))


def test_a_requeued_job_continues(cluster, tmp_path, long_weights):
    chain = ChainRun(cluster, tmp_path, *LONG).start()
    chain.wait_for("epoch", 3)
    cluster.command("scontrol", "requeue", chain.job_of(2))
    code, output = chain.finish()
    assert code == 0, output
    started = [e for e in chain.events("link") if e["action"] == "started"]
    assert [(e["link"], e["restarts"]) for e in started] == [(1, 0), (2, 0), (2, 1)]
    chain.assert_each_submitted_once()
    assert np.array_equal(long_weights, final_weights(chain.run.path))


def test_a_signal_saves_and_the_next_link_continues(cluster, tmp_path, long_weights):
    """`scancel --signal`, as Slurm itself sends it some time before the limit."""
    chain = ChainRun(cluster, tmp_path, *LONG).start()
    chain.wait_for("epoch", 3)
    cluster.command("scancel", "--batch", "--signal=USR1", chain.job_of(2))
    code, output = chain.finish()
    assert code == 0, output
    assert chain.links() == [(1, "resize"), (2, "time"), (3, "done")]
    assert chain.sizes() == [(1, 1), (2, 2), (2, 2)]
    assert not chain.events("failure")
    chain.assert_each_submitted_once()
    assert np.array_equal(long_weights, final_weights(chain.run.path))


def test_a_preempted_job_loses_nothing(cluster, tmp_path, long_weights):
    chain = ChainRun(cluster, tmp_path, *LONG).start()
    chain.wait_for("epoch", 3)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/sh\nsleep 5\n")
    job = cluster.command(
        "sbatch", "--parsable", "-p", "urgent", "-N4", "--exclusive", "-o", "/dev/null", str(urgent)
    )
    code, output = chain.finish()
    assert code == 0, output
    assert job not in cluster.jobs()
    assert not chain.events("failure"), chain.events("failure")
    ends = [e for e in chain.events("phase_end") if e["outcome"] == "stopped"]
    starts = [e["step"] for e in chain.events("phase_start")]
    assert len(ends) == 1
    assert ends[0]["step"] in starts, "a preempted job did steps twice"
    chain.assert_each_submitted_once()
    assert np.array_equal(long_weights, final_weights(chain.run.path))


def test_a_restarted_controller_is_waited_for(cluster, tmp_path, weights):
    """It is down at the decision of the first phase, and up again some seconds later.

    SIGTERM, so that it saves its jobs: killed, it may forget one submitted a moment before.
    """
    chain = ChainRun(cluster, tmp_path).start()
    chain.wait_for("phase_start")
    cluster.kill("slurmctld", signal.SIGTERM)
    chain.wait_for("phase_end")
    cluster.start_controller()
    code, output = chain.finish()
    assert code == 0, output
    chain.assert_each_submitted_once()
    assert np.array_equal(weights, final_weights(chain.run.path))


def test_a_lost_node_costs_a_requeue(cluster, tmp_path, long_weights):
    """slurmd is killed, and what it started is not; Slurm requeues the job when it notices.

    The ranks are suspended until then, so that the run cannot end before.
    """
    chain = ChainRun(cluster, tmp_path, *LONG).start()
    chain.wait_for("phase_start", 2)
    ranks = chain.ranks()
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    nodes = cluster.command("squeue", "-h", "-j", chain.job_of(2), "-o", "%N")
    victim = cluster.command("scontrol", "show", "hostnames", nodes).split()[0]
    cluster.kill(victim)
    try:
        wait_until(lambda: cluster.states()[victim] == "down", 60, "a node that is down")
        wait_until(
            lambda: any(e.get("restarts") for e in chain.events("link")), 60, "a requeued job"
        )
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGCONT)
        code, output = chain.finish()
    finally:
        cluster.start_node(victim)
    assert code == 0, output
    chain.assert_each_submitted_once()
    assert np.array_equal(long_weights, final_weights(chain.run.path))


def test_at_the_time_limit_the_next_link_continues(cluster, tmp_path):
    """A minute is Slurm's shortest limit; the signal is due at once."""
    settings = (
        "train.epochs=120",
        "model.width=16",
        "launch.slurm.time=1",
        "launch.slurm.signal_seconds=58",
    )
    chain = ChainRun(cluster, tmp_path, *settings, most=1).start()
    code, output = chain.finish(400)
    assert code == 0, output
    outcomes = [outcome for _, outcome in chain.links()]
    assert "time" in outcomes
    assert outcomes[-1] == "done"
    chain.assert_each_submitted_once()
    whole = alone(tmp_path, *settings[:2])
    assert np.array_equal(final_weights(whole.path), final_weights(chain.run.path))


def test_gradients_are_accumulated_where_the_partition_is_too_small(cluster, tmp_path, weights):
    chain = ChainRun(cluster, tmp_path, "launch.slurm.partition=narrow", most=4).start()
    code, output = chain.finish()
    assert code == 0, output
    assert (
        "gives one job at most 2 nodes now: batches that could use more than 2 ranks are" in output
    )
    assert chain.sizes() == [(1, 1), (2, 2)]
    assert [e["outcome"] for e in chain.events("phase_end")] == ["resize", "in_place", "done"]
    assert np.array_equal(weights, final_weights(chain.run.path))


def test_cancel_ends_the_chain_and_run_continues_it(cluster, tmp_path, long_weights):
    chain = ChainRun(cluster, tmp_path, *LONG).start()
    chain.wait_for("epoch", 2)
    cancel = chain.command("cancel", str(chain.run.path))
    assert cancel.returncode == 0, cancel
    assert "asked to save and exit" in cancel.stdout or "cancelled while" in cancel.stdout
    code, output = chain.finish()
    assert code == 75, output
    assert not cluster.jobs()
    code, output = chain.start().finish()
    assert code == 0, output
    chain.assert_each_submitted_once()
    assert np.array_equal(long_weights, final_weights(chain.run.path))


def test_a_second_job_of_a_link_exits_at_once(cluster, tmp_path):
    """Whatever submitted it."""
    chain = ChainRun(cluster, tmp_path).start()
    chain.wait_for("phase_start")
    script = chain.run.link_script(1)
    twin = cluster.command("sbatch", "--parsable", f"--output={tmp_path}/twin", str(script))
    wait_until(lambda: twin not in cluster.jobs(), 60, "end of the second job")
    assert (
        f"job {chain.job_of(1)} is on record as this link; exiting"
        in (tmp_path / "twin").read_text()
    )
    assert chain.finish()[0] == 0


@pytest.mark.parametrize("name", ["two words", "50%j", "it's #1 é"])
def test_a_run_can_be_in_any_folder(cluster, tmp_path, name):
    """Slurm splits #SBATCH lines at spaces, replaces %j, and ends them at #."""
    (tmp_path / name).mkdir()
    chain = ChainRun(cluster, tmp_path / name, "train.epochs=1", most=1)
    code, output = chain.start().finish()
    assert code == 0, output
    assert "phase 1" in chain.run.link_log(1).read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == [name]
