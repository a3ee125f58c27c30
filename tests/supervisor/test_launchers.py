import os
import sys

import pytest

from hpc_absa.errors import UsageError
from hpc_absa.supervisor import launchers
from tests.supervisor.digits import digits

WORKER = ("python", "-m", "hpc_absa", "train", "job.toml")


def command(job, ranks):
    return launchers.command(job, ranks, launchers.Command(WORKER))


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """mpirun and the others exist beside a Python environment without a record of its mpirun."""
    for name in ("mpirun", "horovodrun", "srun"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("")
        program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(launchers, "cores", lambda: 2)
    return tmp_path / "bin"


def words(job, ranks):
    return command(job, ranks).words


def test_mpirun(programs):
    assert words(digits(), 2) == (
        str(programs / "mpirun"),
        *("-np", "2", "--bind-to", "none", "--mca", "odls_base_sigkill_timeout", "3"),
        *WORKER,
    )


def test_more_ranks_than_cores_are_allowed_explicitly(programs):
    assert "--oversubscribe" in words(digits(), 3)
    assert "--oversubscribe" not in words(digits(), 2)
    assert "--mpi-args=--bind-to none --mca odls_base_sigkill_timeout 3 --oversubscribe" in words(
        digits("launch.launcher=horovodrun"), 3
    )


def test_the_hardware_threads_of_a_core_are_one_slot(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    for number, siblings in enumerate(("0,2", "1,3", "0,2")):
        file = tmp_path / f"cpu{number}" / "topology" / "thread_siblings_list"
        file.parent.mkdir(parents=True)
        file.write_text(f"{siblings}\n")
    assert launchers.cores(tmp_path) == 3  # of the last one nothing is known


def test_hosts_and_extra_arguments_are_passed_on(programs):
    job = digits("launch.hosts=a:2,b:2", 'launch.extra=["--tag-output"]', "ranks.max=4")
    line = " ".join(words(job, 4))
    assert " -H a:2,b:2 " in line
    assert " --tag-output python -m" in line
    assert "oversubscribe" not in line


def test_horovodrun_finds_mpirun_and_has_slots(programs):
    started = command(digits("launch.launcher=horovodrun"), 4)
    assert started.words[1:5] == ("-np", "4", "-H", "localhost:4")
    assert started.environment["PATH"].startswith(str(programs))


def test_srun_needs_an_allocation(programs, monkeypatch):
    job = digits("launch.launcher=srun")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UsageError, match="not inside a Slurm allocation"):
        words(job, 2)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-4]")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "2(x4)")
    assert words(job, 2) == (str(programs / "srun"), "-N", "1", "-n", "2", *WORKER)
    assert words(job, 5)[1:5] == ("-N", "3", "-n", "5")


def test_ranks_on_other_hosts_get_the_environment(programs, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/here")
    job = digits("launch.hosts=a:2,b:2", "launch.interface=ib0", "launch.rsh_agent=ssh -F x")
    started = command(job, 4)
    line = " ".join(started.words)
    assert " -H a:2,b:2 --mca oob_tcp_keepalive_time 10 " in line
    passed_on = "-x HPC_ABSA_SUPERVISED -x HPC_ABSA_RANKS -x PYTHONPATH"
    assert f" --mca plm_rsh_agent ssh -F x {passed_on}" in line
    assert " -x NCCL_SOCKET_IFNAME " in line
    assert started.environment["OMPI_MCA_btl_tcp_if_include"] == "ib0"
    assert started.environment["HPC_ABSA_SUPERVISED"] == "1"


def test_ranks_are_bound_to_cores_on_request(programs):
    job = digits("launch.bind=core", "train.threads_per_rank=2")
    assert words(job, 2)[3:7] == ("--map-by", "slot:PE=2", "--bind-to", "core")


def test_a_missing_launcher_is_named(programs, monkeypatch):
    (programs / "mpirun").unlink()
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(UsageError, match="launcher mpirun: not found beside"):
        words(digits(), 2)


def test_the_recorded_mpirun_comes_first(programs, tmp_path):
    other = tmp_path / "other-mpirun"
    other.write_text("")
    other.chmod(0o755)
    record = tmp_path / "hpc-absa-env.json"
    record.write_text(f'{{"mpi": {{"mpirun": "{other}"}}}}')
    assert words(digits(), 2)[0] == str(other)
    record.write_text('{"mpi": 3}')
    assert words(digits(), 2)[0] == str(programs / "mpirun")


def test_the_launcher_named_on_the_command_line_is_checked():
    with pytest.raises(UsageError, match=r"launch\.launcher = 'mpiexec': expected 'mpirun'"):
        digits("launch.launcher=mpiexec")
