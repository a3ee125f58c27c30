"""The output of Slurm's commands, and the arguments they are called with."""

import pytest

from hpc_absa.errors import UsageError
from hpc_absa.supervisor.slurm import (
    Partition,
    Slurm,
    SlurmSilentError,
    SubmissionError,
    retry_while_silent,
    submission,
)


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
        Slurm().submit(("sbatch", "x"), "x-1", "")


def test_a_new_job_inherits_nothing_from_the_current_one(slurm, monkeypatch, tmp_path):
    for name in ("SLURM_NTASKS", "SLURM_CONF", "OMPI_COMM_WORLD_SIZE", "HPC_ABSA_SUPERVISED"):
        monkeypatch.setenv(name, "1")
    slurm.respond("sbatch", f"env >{tmp_path}/env; echo '18;cluster'")
    assert Slurm().submit(submission(tmp_path, "17"), "x-1", "") == "18"
    assert slurm.calls("sbatch") == [f"--parsable --dependency=afterany:17 {tmp_path}"]
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert "SLURM_CONF" in names
    assert not names & {"SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "HPC_ABSA_SUPERVISED"}


def test_settings_of_the_site_and_the_user_are_passed_on(slurm, monkeypatch, tmp_path):
    kept = ("SBATCH_ACCOUNT", "SBATCH_RESERVATION", "SLURM_CLUSTERS", "OMPI_MCA_pml")
    stated = ("SBATCH_PARTITION", "SBATCH_TIMELIMIT", "SBATCH_QOS", "SBATCH_NO_REQUEUE")
    current = ("SLURM_JOB_ID", "SLURM_STEP_ID", "OMPI_MCA_orte_hnp_uri", "PMI_RANK", "SBATCH_WAIT")
    for name in kept + stated + current:
        monkeypatch.setenv(name, "x")
    slurm.respond("sbatch", f"env >{tmp_path}/env; echo 18")
    options = "#!/bin/bash\n#SBATCH --partition=gpu\n#SBATCH -t 1:00\n#SBATCH -q high\n"
    Slurm().submit(("sbatch", "x"), "x-1", options + "#SBATCH --requeue\n")
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert set(kept) <= names
    assert not names & {*stated, *current}


@pytest.mark.parametrize(
    ("printed", "job_id"),
    [
        ("Welcome to the cluster of 2024\\n18", "18"),
        ("18;cluster\\nsee https://site/quota?17", "18"),
        ("Submitted batch job 18", "18"),
        ("\\0377\\0376 na\\0357ve\\n18\\n", "18"),  # not UTF-8
        ("2024\\n18", "19"),  # two lines like ids: the queue has it
        ("accepted", "19"),
    ],
)
def test_the_id_is_the_line_that_is_one(slurm, printed, job_id):
    slurm.respond("sbatch", f"printf '{printed}'")
    slurm.respond("squeue", "echo 'motd|of|the|site'; echo '19|x-1|PENDING|None'")
    assert Slurm().submit(("sbatch", "x"), "x-1", "") == job_id
    assert len(slurm.calls("sbatch")) == 1


def test_without_an_id_nothing_is_submitted_again(slurm):
    slurm.respond("sbatch", "echo accepted")
    with pytest.raises(SubmissionError, match="expected one line with a job id, got 'accepted'"):
        retry_while_silent(lambda: Slurm().submit(("sbatch", "x"), "x-1", ""), 5)
    assert len(slurm.calls("sbatch")) == 1


def test_lines_that_slurm_did_not_print_are_passed_over(slurm):
    slurm.respond("sinfo", "printf 'Dear users\\nidle 4\\nmaintenance on friday\\nidle 8+\\n'")
    partitions = slurm.bin / "scontrol"
    partitions.write_text(partitions.read_text().replace("printf '", "printf 'A=1 banner\\n"))
    assert Slurm().partition("") == Partition("main", 2, 4)


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
