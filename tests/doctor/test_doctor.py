"""Each error is caused for real, and the check that reports it also gives a fix."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from hpc_absa.doctor import machine, software
from hpc_absa.doctor.machine import Finding, check_cluster, check_machine, check_run_dir
from hpc_absa.rundir import RunDir
from hpc_absa.supervisor.slurm import Partition
from tests.mpi.conftest import find_mpirun, mpi_environment
from tests.supervisor.digits import PATH, digits

JOB = digits("train.threads_per_rank=1", "ranks.max=1")


def errors(findings, status="error"):
    """Details of the errors, by check; each error has a fix."""
    failed = [f for f in findings if f.status == status]
    assert all(f.detail and f.fix for f in failed)
    return {f.check: f.detail for f in failed}


def assert_only(findings, check, *texts, status="error"):
    """There is one error, of this check, with these texts in its detail or its fix."""
    (failed,) = (f for f in findings if f.status != "ok")
    assert failed.status == status
    assert failed.check == check
    for text in texts:
        assert text in failed.detail + failed.fix


def errors_in_process(call, *argument, env=None, within=()):
    """As `errors`, of a check that is called in another process."""
    code = (
        "import json, sys; from pathlib import Path; from hpc_absa.rundir import RunDir;"
        "from hpc_absa.doctor.machine import check_machine, check_run_dir;"
        f"print(json.dumps([f.__dict__ for f in {call}]))"
    )
    done = subprocess.run(
        [*within, sys.executable, "-c", code, *map(str, argument)],
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return errors(Finding(**f) for f in json.loads(done.stdout.splitlines()[-1]))


needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("unshare"), reason="mounting needs root and unshare"
)


def mounted(folder, size):
    """A command prefix: `folder` is a file system of that size."""
    script = f'mount -t tmpfs -o size={size} none "$0" && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, str(folder)]


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("OMPI_MCA_", "HOROVOD_", "SLURM", "PBS_", "LSB_")):
            monkeypatch.delenv(name)


# Without errors


def test_machine_without_errors():
    assert errors(check_machine(JOB)) == {}


def test_run_dir_without_errors(tmp_path):
    assert errors(check_run_dir(RunDir(tmp_path / "new" / "run"))) == {}
    assert not list(tmp_path.iterdir())


@pytest.mark.mpi
def test_installation_without_errors(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "hpc_absa", "doctor", str(PATH), "--json"),
            *("--set", "ranks.max=1", "--run-dir", str(tmp_path)),
        ],
        env=os.environ | mpi_environment(find_mpirun()),
        capture_output=True,
        text=True,
        timeout=120,
    )
    printed = json.loads(done.stdout)
    assert [f for f in printed["findings"] if f["status"] == "error"] == []
    assert (done.returncode, printed["errors"]) == (0, 0)
    assert {"imports", "horovod over MPI", "one MPI", "mpirun starts ranks", "file locks"} <= {
        f["check"] for f in printed["findings"] if f["status"] == "ok"
    }


def test_findings_have_the_former_names_as_well():
    assert machine.Finding("cores", "error", "2", "more").to_dict() == {
        **{"check": "cores", "status": "error", "detail": "2", "fix": "more"},
        **{"state": "fault", "found": "2", "cure": "more"},
    }


# The machine


def test_open_mpi_parameters_outside_of_the_job(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OMPI_MCA_btl", "self")
    assert_only(check_machine(JOB), "Open MPI's parameters", "OMPI_MCA_btl=self", status="warning")
    monkeypatch.delenv("OMPI_MCA_btl")
    file = tmp_path / ".openmpi" / "mca-params.conf"
    file.parent.mkdir()
    file.write_text("btl = self\n")
    assert_only(check_machine(JOB), "Open MPI's parameters", str(file), status="warning")


def test_launcher_variables_in_the_shell(monkeypatch):
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "5")
    monkeypatch.setenv("HOROVOD_GPU_OPERATIONS", "NCCL")  # read only while Horovod is compiled
    assert_only(check_machine(JOB), "Horovod's settings", "HOROVOD_CYCLE_TIME=5", status="warning")
    monkeypatch.delenv("HOROVOD_CYCLE_TIME")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert_only(check_machine(JOB), "launcher's variables", "OMPI_COMM_WORLD_SIZE")


def test_too_few_open_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert_only(check_machine(JOB), "open files", "256", "ulimit -n")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_long_temporary_folder(monkeypatch, tmp_path):
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert_only(check_machine(JOB), "temporary folder", "TMPDIR=/tmp")


@needs_root
def test_too_little_shared_memory():
    check = "check_machine(None)"
    assert set(errors_in_process(check, within=mounted("/dev/shm", "1m"))) == {"shared memory"}


@needs_root
def test_host_name_without_address():
    within = ["unshare", "--uts", "sh", "-c", 'hostname no-such-host && exec "$@"', "x"]
    assert set(errors_in_process("check_machine(None)", within=within)) == {"host name"}


def test_too_few_cores():
    job = digits("train.threads_per_rank=1000", "ranks.max=2")
    assert_only(check_machine(job), "cores", "need 2000", status="warning")


# The run directory


def test_run_dir_that_cannot_be_written():
    assert_only(check_run_dir(RunDir(Path("/proc/self/run"))), "run directory", "/proc")


@needs_root
def test_full_disk(tmp_path):
    failed = errors_in_process(
        "check_run_dir(RunDir(Path(sys.argv[1])))",
        tmp_path,
        within=mounted(tmp_path, "1m"),
    )
    assert set(failed) == {"space"}
    assert "No space left" in failed["space"]


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_file_system_without_locks(tmp_path):
    (tmp_path / "flock.c").write_text(
        "#include <errno.h>\nint flock(int fd, int how) { errno = ENOLCK; return -1; }\n"
    )
    library = tmp_path / "flock.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "flock.c")], check=True
    )
    failed = errors_in_process(
        "check_run_dir(RunDir(Path(sys.argv[1])))",
        tmp_path,
        env={"LD_PRELOAD": str(library)},
    )
    assert set(failed) == {"file locks"}


def test_stale_lock(tmp_path):
    run = RunDir(tmp_path).create()
    ended = subprocess.Popen(["true"])
    ended.wait()
    holder = {"host": socket.gethostname(), "pid": ended.pid, "started": time.time()}
    run.lock.write_text(json.dumps(holder))
    assert_only(
        check_run_dir(run), "run's lock", str(ended.pid), "takes the lock over", status="warning"
    )


def test_damaged_checkpoint(tmp_path):
    run = RunDir(tmp_path).create()
    run.checkpoint(3, 1).write_bytes(b"\x89HDF\r\n\x1a\n and no more")
    assert_only(check_run_dir(run), "checkpoints", "step-0000000003")


# Slurm and hosts


def test_no_slurm_client(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_only(check_cluster(digits("launch.launcher=slurm")), "slurm client", "sbatch")
    assert errors(check_cluster(digits())) == {}


@pytest.mark.skipif(not shutil.which("sbatch"), reason="Slurm's client is not installed")
def test_controller_that_does_not_answer(monkeypatch, tmp_path):
    conf = tmp_path / "slurm.conf"
    conf.write_text(
        "ClusterName=x\nSlurmctldHost=localhost\nSlurmctldPort=9\nAuthType=auth/none\n"
        "MessageTimeout=2\nTCPTimeout=1\nNodeName=a CPUs=1\nPartitionName=p Nodes=a\n"
    )
    monkeypatch.setenv("SLURM_CONF", str(conf))
    failed = errors(check_cluster(digits("launch.launcher=slurm")))
    assert set(failed) == {"slurm controller"}


def test_allocation_without_its_node_file(monkeypatch):
    monkeypatch.setenv("PBS_JOBID", "7")
    monkeypatch.setenv("PBS_NODEFILE", "/var/spool/none")
    failed = errors(check_cluster(None))
    assert "PBS_NODEFILE" in failed["allocation"]


def test_too_few_slots():
    job = digits("launch.hosts=localhost:1", "ranks.initial=4")
    assert_only(check_cluster(job), "slots", "4", "1 slots")


def job_with_agent(folder, body):
    """A job on another host, which is reached with a shell script."""
    path = folder / "agent"
    path.write_text(f"#!/bin/sh\nshift\n{body}\n")
    path.chmod(0o755)
    return digits("launch.hosts=192.0.2.7:4", f"launch.rsh_agent={path}")


def test_host_that_does_not_answer(tmp_path):
    assert errors(check_cluster(job_with_agent(tmp_path, 'sh -c "$*"'))) == {}
    assert_only(check_cluster(job_with_agent(tmp_path, "exit 255")), "hosts", "192.0.2.7")


def test_clocks_that_differ(tmp_path):
    late = tmp_path / "late"
    late.mkdir()
    (late / "date").write_text('#!/bin/sh\nexec /bin/date -d "90 seconds" "$@"\n')
    (late / "date").chmod(0o755)
    job = job_with_agent(tmp_path, f'PATH={late}:$PATH sh -c "$*"')
    assert_only(check_cluster(job), "clocks", "90 s", "chrony")


def test_host_without_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    job = job_with_agent(tmp_path, 'sh -c "$*"')
    assert_only(check_cluster(job), "environment on hosts", "/no/such/python")


def test_missing_setup_script_and_small_partition(monkeypatch):
    class FakeSlurm:
        def __init__(self, seconds):
            pass

        def partition(self, name):
            return Partition("main", 1, 1)

    monkeypatch.setattr(machine, "Slurm", FakeSlurm)
    job = digits("launch.launcher=slurm", "launch.slurm.setup_script=/none", "ranks.initial=2")
    failed = errors(check_cluster(job))
    assert set(failed) == {"slurm setup script", "slurm partition"}


# Software


def package(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


CPU_BUILD = {
    "torch": {"version": "2"},
    "h5py": {"version": "3"},
    "mpi4py": {"version": "4"},
    "horovod": {"version": "0.28.1"},
    "horovod.torch": {"version": ""},
    "libmpi": ["/lib/libmpi.so"],
    "cuda": None,
    "gpus": 0,
    "built": {"mpi": True, "gloo": True, "nccl": False},
}


def software_errors(monkeypatch, folder):
    """Errors with `folder` first on Python's path."""
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{os.environ.get('PYTHONPATH', '')}")
    probed = software.probe()
    return errors([*software.check_packages(probed), *software.check_gpu(probed)])


@pytest.mark.mpi
def test_two_mpi_libraries(monkeypatch, tmp_path):
    """mpi4py loads another libmpi than Horovod: here a copy of it."""
    (ours,) = software.probe()["libmpi"]
    other = tmp_path / Path(ours).name
    shutil.copy(ours, other)
    text = "import types\n__version__ = '4'\nrc = types.SimpleNamespace()\n"
    package(tmp_path, "mpi4py/__init__.py", text)
    package(tmp_path, "mpi4py/MPI.py", f"import ctypes\nctypes.CDLL({str(other)!r})\n")
    failed = software_errors(monkeypatch, tmp_path)
    assert set(failed) == {"one MPI"}
    assert ours in failed["one MPI"]
    assert str(other) in failed["one MPI"]


def test_horovod_that_cannot_be_imported(monkeypatch, tmp_path):
    package(tmp_path, "horovod/__init__.py", "raise ImportError('libmpi.so.40: cannot open')\n")
    failed = software_errors(monkeypatch, tmp_path)
    assert "libmpi.so.40: cannot open" in failed["horovod"]


def test_horovod_without_mpi(monkeypatch, tmp_path):
    package(tmp_path, "horovod/__init__.py", "__version__ = '0.28.1'\n")
    built = "def mpi_built(): return False\ngloo_built = lambda: True\nnccl_built = mpi_built\n"
    package(tmp_path, "horovod/torch/__init__.py", built)
    failed = software_errors(monkeypatch, tmp_path)
    assert "without MPI" in failed["horovod over MPI"]


def test_package_that_cannot_be_imported(monkeypatch, tmp_path):
    package(tmp_path, "h5py.py", "raise ImportError('libhdf5.so: undefined symbol')\n")
    assert "undefined symbol" in software_errors(monkeypatch, tmp_path)["h5py"]


def test_torchvision_for_another_torch(monkeypatch, tmp_path):
    package(
        tmp_path,
        "torchvision-0.20.0.dist-info/METADATA",
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.20.0\n"
        "Requires-Dist: torch (==2.5.0)\n",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    failed = errors([software._torchvision()])["torchvision fits torch"]
    assert "torchvision 0.20.0 requires torch 2.5.0" in failed


def test_packages_without_gpu_support_on_a_machine_with_a_gpu(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    findings = list(software.check_gpu(CPU_BUILD))
    assert set(errors(findings)) == {"torch on the GPU"}
    assert "NCCL" in errors(findings, "warning")["horovod on the GPU"]


@pytest.mark.mpi
def test_mpirun_that_fails(monkeypatch):
    monkeypatch.setenv("OMPI_MCA_plm", "none-such")
    assert "mpirun" in errors([software._mpirun()])["mpirun starts ranks"]


@pytest.mark.mpi
def test_mpirun_of_another_mpi_library(monkeypatch, tmp_path):
    alone = tmp_path / "mpirun"
    alone.write_text('#!/bin/sh\nshift 3\nexec "$@"\n')
    alone.chmod(0o755)
    monkeypatch.setattr(software, "program", lambda _: str(alone))
    assert "MPI_COMM_WORLD has size 1" in errors([software._mpirun()])["mpirun starts ranks"]


def test_no_mpirun(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "not found" in errors([software._mpirun()])["mpirun starts ranks"]
