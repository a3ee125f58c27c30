"""The output of Slurm's commands, and the arguments they are called with."""

import pytest

from hpc_absa.errors import UsageError
from hpc_absa.supervisor.slurm import Slurm, SlurmSilentError, retry_while_silent, submission


def test_missing_slurm_commands_are_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="sbatch is not on PATH; run this on a login node"):
        Slurm()


def test_a_partition_gives_its_usable_nodes(slurm):
    main = Slurm().partition("")
    assert (main.name, main.max_nodes, main.cpus) == ("main", 4, 4)
    assert Slurm().partition("narrow").max_nodes == 2
    with pytest.raises(UsageError, match="partition = 'wide': expected one of main, narrow"):
        Slurm().partition("wide")


def test_jobs_are_selected_by_the_beginning_of_their_name(slurm):
    lines = "3|x-1|RUNNING|None\\n4|x-2|PENDING|Dependency\\n5|y|RUNNING|None\\n"
    slurm.respond("squeue", f"printf '{lines}'")
    jobs = Slurm().jobs("x-")
    assert [(j.job_id, j.state, j.reason) for j in jobs] == [
        ("3", "RUNNING", "None"),
        ("4", "PENDING", "Dependency"),
    ]
    assert all(job.alive for job in jobs)


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETED", "NODE_FAIL", "PREEMPTED", "TIMEOUT"])
def test_jobs_in_a_final_state_are_not_alive(slurm, state):
    slurm.respond("squeue", f"echo '3|x|{state}|None'")
    assert not Slurm().jobs("x")[0].alive


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("Unable to contact slurm controller (connect failure)", SlurmSilentError),
        ("Batch job submission failed: Socket timed out on send/recv operation", SlurmSilentError),
        ("Batch job submission failed: Invalid account", UsageError),
        ("Batch job submission failed: Node count specification invalid", UsageError),
    ],
)
def test_no_answer_is_not_a_refusal(slurm, message, error):
    slurm.respond("sbatch", f"echo 'sbatch: error: {message}' >&2; exit 1")
    with pytest.raises(error, match=message.split(": ")[-1][:12]):
        Slurm().submit(("sbatch", "x"))


def test_a_new_job_inherits_nothing_from_the_current_one(slurm, monkeypatch, tmp_path):
    for name in ("SLURM_NTASKS", "SLURM_CONF", "OMPI_COMM_WORLD_SIZE", "HPC_ABSA_SUPERVISED"):
        monkeypatch.setenv(name, "1")
    slurm.respond("sbatch", f"env >{tmp_path}/env; echo '18;cluster'")
    assert Slurm().submit(submission(tmp_path, "17")) == "18"
    assert slurm.calls("sbatch") == [f"--parsable --dependency=afterany:17 {tmp_path}"]
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert "SLURM_CONF" in names
    assert not names & {"SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "HPC_ABSA_SUPERVISED"}


def test_cancelling_a_job_that_has_ended_is_not_an_error(slurm):
    slurm.respond("scancel", "echo 'scancel: error: Invalid job id 9' >&2; exit 1")
    Slurm().cancel("9")
    slurm.respond("scancel", "echo 'scancel: error: Access/permission denied' >&2; exit 1")
    with pytest.raises(UsageError, match="permission"):
        Slurm().cancel("9")


@pytest.mark.parametrize(
    ("fields", "preempted"),
    [
        ("JobState=RUNNING PreemptTime=2026-01-01T00:00:00", True),
        ("JobState=RUNNING PreemptTime=None", False),
        ("JobState=COMPLETING PreemptTime=2026-01-01T00:00:00", False),
    ],
)
def test_the_grace_time_of_a_preemption(slurm, fields, preempted):
    slurm.respond("scontrol", f"echo 'JobId=3 {fields} NodeList=n1'")
    assert Slurm().preempted("3") is preempted


def test_a_call_is_repeated_while_the_controller_does_not_answer():
    answers = [SlurmSilentError("no"), SlurmSilentError("no"), "yes"]

    def call():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert retry_while_silent(call, 10, pause=0) == "yes"
    with pytest.raises(SlurmSilentError):
        retry_while_silent(lambda: (_ for _ in ()).throw(SlurmSilentError("no")), -1, pause=0)
