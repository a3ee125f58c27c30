"""Each fault is seeded for real, found under its name, and has its cure."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from hpc_absa.doctor import cluster, directory, software, surroundings
from hpc_absa.rundir import RunDir
from tests.mpi.conftest import find_mpirun, mpi_environment
from tests.supervisor.digits import PATH, digits

CHECKS = {
    "surroundings": surroundings.check_surroundings,
    "software": software.check_software,
    "cluster": cluster.check_cluster,
}
JOB = digits("train.threads_per_rank=1", "ranks.max=1")


def faults(findings):
    """Faults by name; each has something found and a cure."""
    found = {f.check: f for f in findings if f.state == "fault"}
    assert all(f.found and f.cure for f in found.values())
    return found


def assert_only(findings, name, *words):
    """One fault, of this name, with these words in what was found or its cure."""
    found = faults(findings)
    assert set(found) == {name}, found
    for word in words:
        assert word in found[name].found + found[name].cure


def apart(check, *argument, env=None, within=()):
    """The faults that a check finds in a process of its own, by name."""
    code = (
        "import json, sys; from dataclasses import asdict; from pathlib import Path;"
        "from hpc_absa.rundir import RunDir;"
        "from hpc_absa.doctor import directory, software, surroundings;"
        f"found = {check};"
        "print(json.dumps([asdict(f) for f in found if f.state == 'fault']))"
    )
    done = subprocess.run(
        [*within, sys.executable, "-c", code, *map(str, argument)],
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert all(f["found"] and f["cure"] for f in told)
    return {f["check"]: f["found"] for f in told}


needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("unshare"), reason="mounting needs root and unshare"
)


def mounted(folder, size):
    """Words that run a command where `folder` is a file system of that size."""
    script = f'mount -t tmpfs -o size={size} none "$0" && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, str(folder)]


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("OMPI_MCA_", "SLURM", "PBS_", "LSB_")):
            monkeypatch.delenv(name)


# A sound machine


def test_surroundings_without_a_fault():
    assert faults(surroundings.check_surroundings(JOB)) == {}


def test_a_folder_without_a_fault(tmp_path):
    assert faults(directory.check_directory(RunDir(tmp_path / "new" / "run"))) == {}
    assert not list(tmp_path.iterdir())


@pytest.mark.mpi
def test_the_installation_has_no_fault(tmp_path):
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
    told = json.loads(done.stdout)
    assert [f for f in told["findings"] if f["state"] == "fault"] == []
    assert (done.returncode, told["faults"]) == (0, 0)
    assert {"imports", "horovod over MPI", "one MPI", "mpirun starts ranks", "file locks"} <= {
        f["check"] for f in told["findings"] if f["state"] == "good"
    }


# Surroundings


def test_leftover_parameters_of_open_mpi(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OMPI_MCA_btl", "self")
    assert_only(surroundings.check_surroundings(JOB), "Open MPI's parameters", "OMPI_MCA_btl=self")
    monkeypatch.delenv("OMPI_MCA_btl")
    file = tmp_path / ".openmpi" / "mca-params.conf"
    file.parent.mkdir()
    file.write_text("btl = self\n")
    assert_only(surroundings.check_surroundings(JOB), "Open MPI's parameters", str(file))


def test_a_shell_that_looks_like_a_rank(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert_only(
        surroundings.check_surroundings(JOB), "launcher's variables", "OMPI_COMM_WORLD_SIZE"
    )


def test_too_few_open_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert_only(surroundings.check_surroundings(JOB), "open files", "256", "ulimit -n")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_temporary_folder_of_too_long_a_name(monkeypatch, tmp_path):
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert_only(surroundings.check_surroundings(JOB), "temporary folder", "TMPDIR=/tmp")


@needs_root
def test_little_shared_memory():
    check = "surroundings.check_surroundings(None)"
    assert set(apart(check, within=mounted("/dev/shm", "1m"))) == {"shared memory"}


@needs_root
def test_a_host_name_without_an_address():
    within = ["unshare", "--uts", "sh", "-c", 'hostname no-such-host && exec "$@"', "x"]
    assert set(apart("surroundings.check_surroundings(None)", within=within)) == {"host name"}


def test_too_few_cores():
    job = digits("train.threads_per_rank=1000", "ranks.max=2")
    assert_only(surroundings.check_surroundings(job), "cores", "2000 cores")


# The run directory


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert_only(directory.check_directory(RunDir(Path("/proc/self/run"))), "run directory", "/proc")


@needs_root
def test_a_full_disk(tmp_path):
    found = apart(
        "directory.check_directory(RunDir(Path(sys.argv[1])))",
        tmp_path,
        within=mounted(tmp_path, "1m"),
    )
    assert set(found) == {"space"}
    assert "No space left" in found["space"]


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_a_file_system_without_locks(tmp_path):
    (tmp_path / "flock.c").write_text(
        "#include <errno.h>\nint flock(int fd, int how) { errno = ENOLCK; return -1; }\n"
    )
    library = tmp_path / "flock.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "flock.c")], check=True
    )
    found = apart(
        "directory.check_directory(RunDir(Path(sys.argv[1])))",
        tmp_path,
        env={"LD_PRELOAD": str(library)},
    )
    assert set(found) == {"file locks"}


def test_a_stale_lock(tmp_path):
    run = RunDir(tmp_path).create()
    gone = subprocess.Popen(["true"])
    gone.wait()
    told = {"host": socket.gethostname(), "pid": gone.pid, "started": time.time()}
    run.lock.write_text(json.dumps(told))
    assert_only(directory.check_directory(run), "run's lock", str(gone.pid), "takes the lock over")


def test_a_damaged_checkpoint(tmp_path):
    run = RunDir(tmp_path).create()
    run.checkpoint(3, 1).write_bytes(b"\x89HDF\r\n\x1a\n and no more")
    assert_only(directory.check_directory(run), "checkpoints", "step-0000000003")


# Slurm and hosts


def test_no_slurm_client(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_only(cluster.check_cluster(digits("launch.launcher=slurm")), "slurm client", "sbatch")
    assert faults(cluster.check_cluster(digits())) == {}


@pytest.mark.skipif(not shutil.which("sbatch"), reason="Slurm's client is not installed")
def test_a_silent_controller(monkeypatch, tmp_path):
    conf = tmp_path / "slurm.conf"
    conf.write_text(
        "ClusterName=x\nSlurmctldHost=localhost\nSlurmctldPort=9\nAuthType=auth/none\n"
        "MessageTimeout=2\nTCPTimeout=1\nNodeName=a CPUs=1\nPartitionName=p Nodes=a\n"
    )
    monkeypatch.setenv("SLURM_CONF", str(conf))
    found = faults(cluster.check_cluster(digits("launch.launcher=slurm")))
    assert set(found) == {"slurm controller"}


def test_a_shell_that_lost_its_allocation(monkeypatch):
    monkeypatch.setenv("PBS_JOBID", "7")
    monkeypatch.setenv("PBS_NODEFILE", "/var/spool/none")
    found = faults(cluster.check_cluster(None))
    assert "PBS_NODEFILE" in found["allocation"].found


def test_too_few_slots():
    job = digits("launch.hosts=localhost:1", "ranks.initial=4")
    assert_only(cluster.check_cluster(job), "slots", "4", "1 slots")


def agent(folder, body):
    path = folder / "agent"
    path.write_text(f"#!/bin/sh\nshift\n{body}\n")
    path.chmod(0o755)
    return digits("launch.hosts=192.0.2.7:4", f"launch.rsh_agent={path}")


def test_a_host_that_answers_and_one_that_does_not(tmp_path):
    assert faults(cluster.check_cluster(agent(tmp_path, 'sh -c "$*"'))) == {}
    assert_only(cluster.check_cluster(agent(tmp_path, "exit 255")), "hosts", "192.0.2.7")


def test_a_clock_that_differs(tmp_path):
    late = tmp_path / "late"
    late.mkdir()
    (late / "date").write_text('#!/bin/sh\nexec /bin/date -d "90 seconds" "$@"\n')
    (late / "date").chmod(0o755)
    job = agent(tmp_path, f'PATH={late}:$PATH sh -c "$*"')
    assert_only(cluster.check_cluster(job), "clocks", "90 s", "chrony")


def test_a_host_without_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    job = agent(tmp_path, 'sh -c "$*"')
    assert_only(cluster.check_cluster(job), "environment on hosts", "/no/such/python")


def test_a_prologue_that_is_not_there(monkeypatch):
    class Answers:
        def __init__(self, seconds):
            pass

        def partition(self, name):
            return cluster_partition()

    def cluster_partition():
        from hpc_absa.supervisor.slurm import Partition

        return Partition("main", 1, None, 1)

    monkeypatch.setattr(cluster, "Slurm", Answers)
    job = digits("launch.launcher=slurm", "launch.slurm.setup_script=/none", "ranks.initial=2")
    found = faults(cluster.check_cluster(job))
    assert set(found) == {"slurm setup script", "slurm partition"}


# Software


def package(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


SOUND = {
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


def software_apart(monkeypatch, folder):
    """What is found with `folder` first among the packages."""
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{os.environ.get('PYTHONPATH', '')}")
    probed = software.probe()
    findings = [
        *software._packages(probed),
        *software._horovod(probed),
        software._one_mpi(probed),
        *software._gpu(probed),
    ]
    return {f.check: asdict(f) for f in findings if f.state == "fault"}


@pytest.mark.mpi
def test_two_mpis(monkeypatch, tmp_path):
    """An mpi4py that is bound to another libmpi than Horovod: here a copy of it."""
    (ours,) = software.probe()["libmpi"]
    other = tmp_path / Path(ours).name
    shutil.copy(ours, other)
    text = "import types\n__version__ = '4'\nrc = types.SimpleNamespace()\n"
    package(tmp_path, "mpi4py/__init__.py", text)
    package(tmp_path, "mpi4py/MPI.py", f"import ctypes\nctypes.CDLL({str(other)!r})\n")
    found = software_apart(monkeypatch, tmp_path)
    assert set(found) == {"one MPI"}
    assert ours in found["one MPI"]["found"]
    assert str(other) in found["one MPI"]["found"]


def test_horovod_that_does_not_import(monkeypatch, tmp_path):
    package(tmp_path, "horovod/__init__.py", "raise ImportError('libmpi.so.40: cannot open')\n")
    found = software_apart(monkeypatch, tmp_path)
    assert "libmpi.so.40: cannot open" in found["horovod"]["found"]


def test_horovod_without_mpi(monkeypatch, tmp_path):
    package(tmp_path, "horovod/__init__.py", "__version__ = '0.28.1'\n")
    built = "def mpi_built(): return False\ngloo_built = lambda: True\nnccl_built = mpi_built\n"
    package(tmp_path, "horovod/torch/__init__.py", built)
    found = software_apart(monkeypatch, tmp_path)
    assert "without MPI" in found["horovod over MPI"]["found"]


def test_a_package_that_is_broken(monkeypatch, tmp_path):
    package(tmp_path, "h5py.py", "raise ImportError('libhdf5.so: undefined symbol')\n")
    assert "undefined symbol" in software_apart(monkeypatch, tmp_path)["h5py"]["found"]


def test_torchvision_of_another_torch(monkeypatch, tmp_path):
    package(
        tmp_path,
        "torchvision-0.20.0.dist-info/METADATA",
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.20.0\n"
        "Requires-Dist: torch (==2.5.0)\n",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = faults([software._torchvision()])["torchvision fits torch"]
    assert "torchvision 0.20.0 is made for torch 2.5.0" in found.found


def test_horovod_and_torch_for_cpus_beside_a_gpu(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = faults(software._gpu(SOUND))
    assert set(found) == {"horovod on the GPU", "torch on the GPU"}
    assert "NCCL" in found["horovod on the GPU"].found


@pytest.mark.mpi
def test_an_mpirun_that_starts_nothing(monkeypatch):
    monkeypatch.setenv("OMPI_MCA_plm", "none-such")
    assert "mpirun" in faults([software._mpirun()])["mpirun starts ranks"].found


@pytest.mark.mpi
def test_an_mpirun_of_another_mpi_starts_each_rank_alone(monkeypatch, tmp_path):
    alone = tmp_path / "mpirun"
    alone.write_text('#!/bin/sh\nshift 3\nexec "$@"\n')
    alone.chmod(0o755)
    monkeypatch.setattr(software, "program", lambda _: str(alone))
    assert "world of 1" in faults([software._mpirun()])["mpirun starts ranks"].found


def test_no_mpirun(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "not found" in faults([software._mpirun()])["mpirun starts ranks"].found
