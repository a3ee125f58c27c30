"""What Slurm's commands print, read; what they are asked."""

import pytest

from hpc_absa.errors import UsageError
from hpc_absa.supervisor.slurm import Slurm, SlurmSilentError, patiently, submission


def test_without_slurm_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="sbatch is not on PATH; run this on a login node"):
        Slurm()


def test_a_partition_gives_the_nodes_that_are_in_order(slurm):
    main = Slurm().partition("")
    assert (main.name, main.max_nodes, main.limit, main.cpus) == ("main", 4, None, 4)
    narrow = Slurm().partition("narrow")
    assert (narrow.max_nodes, narrow.limit) == (2, 2)
    with pytest.raises(UsageError, match="partition = 'wide': expected one of main, narrow"):
        Slurm().partition("wide")


def test_jobs_are_read_and_told_apart(slurm):
    lines = "3|x-1|RUNNING|None|2\\n4|x-2|PENDING|Dependency|4\\n5|y|RUNNING|None|1\\n"
    slurm.says("squeue", f"printf '{lines}'")
    jobs = Slurm().jobs("x-")
    assert [(j.job_id, j.state, j.reason, j.nodes) for j in jobs] == [
        ("3", "RUNNING", "None", 2),
        ("4", "PENDING", "Dependency", 4),
    ]
    assert all(job.alive for job in jobs)


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETED", "NODE_FAIL", "PREEMPTED", "TIMEOUT"])
def test_what_has_ended(slurm, state):
    slurm.says("squeue", f"echo '3|x|{state}|None|1'")
    assert not Slurm().jobs("x")[0].alive


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("Unable to contact slurm controller (connect failure)", SlurmSilentError),
        ("Batch job submission failed: Socket timed out on send/recv operation", SlurmSilentError),
        ("Batch job submission failed: Invalid account", UsageError),
        ("Batch job submission failed: Node count specification invalid", UsageError),
    ],
)
def test_silence_is_no_refusal(slurm, words, error):
    slurm.says("sbatch", f"echo 'sbatch: error: {words}' >&2; exit 1")
    with pytest.raises(error, match=words.split(": ")[-1][:12]):
        Slurm().submit(("sbatch", "x"))


def test_a_new_job_inherits_nothing_of_the_present_ones(slurm, monkeypatch, tmp_path):
    for name in ("SLURM_NTASKS", "SLURM_CONF", "OMPI_COMM_WORLD_SIZE", "HPC_ABSA_SUPERVISED"):
        monkeypatch.setenv(name, "1")
    slurm.says("sbatch", f"env >{tmp_path}/env; echo '18;cluster'")
    assert Slurm().submit(submission(tmp_path, "17")) == "18"
    assert slurm.asked("sbatch") == [f"--parsable --dependency=afterany:17 {tmp_path}"]
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert "SLURM_CONF" in names
    assert not names & {"SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "HPC_ABSA_SUPERVISED"}


def test_cancelling_what_is_gone_is_no_error(slurm):
    slurm.says("scancel", "echo 'scancel: error: Invalid job id 9' >&2; exit 1")
    Slurm().cancel("9")
    slurm.says("scancel", "echo 'scancel: error: Access/permission denied' >&2; exit 1")
    with pytest.raises(UsageError, match="permission"):
        Slurm().cancel("9")


@pytest.mark.parametrize(
    ("told", "preempted"),
    [
        ("JobState=RUNNING PreemptTime=2026-01-01T00:00:00", True),
        ("JobState=RUNNING PreemptTime=None", False),
        ("JobState=COMPLETING PreemptTime=2026-01-01T00:00:00", False),
    ],
)
def test_the_grace_time_of_a_preemption(slurm, told, preempted):
    slurm.says("scontrol", f"echo 'JobId=3 {told} NodeList=n1'")
    assert Slurm().preempted("3") is preempted


def test_a_silent_controller_is_asked_again():
    answers = [SlurmSilentError("no"), SlurmSilentError("no"), "yes"]

    def ask():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently(ask, 10, pause=0) == "yes"
    with pytest.raises(SlurmSilentError):
        patiently(lambda: (_ for _ in ()).throw(SlurmSilentError("no")), -1, pause=0)
