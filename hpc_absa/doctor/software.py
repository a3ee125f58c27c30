"""The Python packages and the MPI beneath them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from hpc_absa.config import Job
from hpc_absa.doctor.finding import Finding, absent, fault, good
from hpc_absa.errors import UsageError
from hpc_absa.supervisor.launchers import mpi_environment, program

REBUILD = "launch/bootstrap.sh builds an environment in which they fit"


def check_software(job: Job | None) -> Iterator[Finding]:
    """All of it."""
    probed = probe()
    yield from _packages(probed)
    yield _torchvision()
    yield from _horovod(probed)
    yield _one_mpi(probed)
    yield from _gpu(probed)
    yield _mpirun()


def probe() -> dict[str, Any]:
    """What `probe.py` printed; where its process died, `died` says how."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "hpc_absa.doctor.probe"],
        capture_output=True,
        text=True,
        env=os.environ | mpi_environment(),
        check=False,
    )
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    except (ValueError, IndexError):
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        return {"died": f"exit status {done.returncode}, last word: {said}"}


def _packages(probed: dict[str, Any]) -> Iterator[Finding]:
    if died := probed.get("died"):
        yield fault("imports", f"importing the packages ended the process: {died}", REBUILD)
        return
    names = ("torch", "h5py", "mpi4py")
    for name in names:
        if error := probed[name].get("error"):
            yield fault(f"{name}", error, f"install it into {sys.prefix}, or {REBUILD}")
    if not any("error" in probed[name] for name in names):
        yield good("imports", ", ".join(f"{name} {probed[name]['version']}" for name in names))


def _torchvision() -> Finding:
    """By what the packages say of themselves; nothing is imported."""
    name = "torchvision fits torch"
    try:
        ours, wanted = metadata.version("torch"), metadata.requires("torchvision") or []
    except metadata.PackageNotFoundError as error:
        return fault(name, f"{error.name} is not installed", REBUILD)
    pins = (re.match(r"torch\s*\(?==\s*([\w.]+)", word) for word in wanted)
    version = metadata.version("torchvision")
    pinned = next((pin[1] for pin in pins if pin), None)
    if pinned and pinned != ours.split("+")[0]:
        return fault(
            name,
            f"torchvision {version} is made for torch {pinned}, installed is {ours}",
            f"pip install torch=={pinned}, or the torchvision that goes with {ours}",
        )
    return good(name, f"torchvision {version}, torch {ours}")


def _horovod(probed: dict[str, Any]) -> Iterator[Finding]:
    if "died" in probed:
        return
    if error := (probed["horovod"].get("error") or probed["horovod.torch"].get("error")):
        yield fault("horovod", error, f"{REBUILD}; a plain `pip install horovod` does not compile")
        return
    built = probed["built"]
    version = probed["horovod"]["version"]
    if not built["mpi"]:
        yield fault(
            "horovod over MPI",
            f"Horovod {version} was built without MPI",
            "remove its wheel (pip uninstall horovod), have mpicc on PATH or HPC_ABSA_MPI=package, "
            "and run launch/bootstrap.sh",
        )
        return
    with_ = ", ".join(what.upper() for what, there in built.items() if there)
    yield good("horovod over MPI", f"Horovod {version} with {with_}")


def _one_mpi(probed: dict[str, Any]) -> Finding:
    name, libraries = "one MPI", probed.get("libmpi", [])
    if len(libraries) > 1:
        return fault(
            name,
            f"Horovod and mpi4py load different MPIs: {' and '.join(libraries)}",
            "unset MPI4PY_LIBMPI and LD_LIBRARY_PATH, load the MPI module that the environment was "
            "made with, or make it anew: launch/bootstrap.sh",
        )
    if not libraries:
        return fault(name, "no libmpi was loaded", REBUILD)
    return good(name, libraries[0])


def _gpu(probed: dict[str, Any]) -> Iterator[Finding]:
    there = _gpus_of_this_machine()
    if not there:
        yield absent("gpu", "no GPU in this machine (nvidia-smi -L shows none)")
        return
    if not probed.get("gpus"):
        yield fault(
            "torch on the GPU",
            f"{there} GPUs in this machine, torch sees none (built for CUDA {probed.get('cuda')})",
            "install a CUDA build of torch, check the driver and CUDA_VISIBLE_DEVICES",
        )
    else:
        yield good("torch on the GPU", f"{probed['gpus']} GPUs, CUDA {probed['cuda']}")
    if not probed.get("built", {}).get("nccl"):
        yield fault(
            "horovod on the GPU",
            f"{there} GPUs in this machine, Horovod was built without NCCL: gradients travel "
            "through host memory",
            "make setup HOROVOD_GPU_OPERATIONS=NCCL, with nvcc and NCCL in reach",
        )
    else:
        yield good("horovod on the GPU", "gradients travel over NCCL")


def _gpus_of_this_machine() -> int:
    if not (tool := shutil.which("nvidia-smi")):
        return 0
    done = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


def _mpirun() -> Finding:
    name = "mpirun starts ranks"
    code = (
        "from mpi4py import MPI; n = MPI.COMM_WORLD.allreduce(1);"
        "raise SystemExit(n != 2 and f'a rank saw a world of {n}, expected 2')"
    )
    try:
        mpirun = program("mpirun")
    except UsageError as error:
        return fault(name, str(error), "make setup, or load your site's MPI module")
    words = [mpirun, "--oversubscribe", "-np", "2", sys.executable, "-c", code]
    try:
        done = subprocess.run(
            words,
            env=os.environ | mpi_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return fault(name, f"{mpirun}: two ranks do not meet within 60 s", _MPIRUN_CURE)
    if done.returncode == 0:  # not by what they print: their lines may be mixed
        return good(name, f"{mpirun}, two ranks met")
    said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip(" -")]
    return fault(name, f"{mpirun}: {' '.join((said or ['no word'])[:2])}", _MPIRUN_CURE)


_MPIRUN_CURE = (
    "look for OMPI_MCA_ variables and ~/.openmpi/mca-params.conf, and try "
    "`mpirun -np 2 hostname`; on a login node where mpirun is forbidden, look from a job"
)
