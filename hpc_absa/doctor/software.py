"""Checks of the Python packages, of the MPI library that they load, and of mpirun."""

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

from hpc_absa import config
from hpc_absa.config import Job
from hpc_absa.doctor.machine import Finding, advise, require
from hpc_absa.errors import UsageError
from hpc_absa.report.format import size
from hpc_absa.supervisor.launchers import mpi_environment, program
from hpc_absa.supervisor.process import PYTHON

REHEARSAL_SECONDS = 600
"""Longest time that a rehearsal takes, with building the data set."""
REBUILD = "launch/bootstrap.sh builds an environment in which the packages fit together"


def check_software() -> Iterator[Finding]:
    """The packages, Horovod, MPI, the GPU, and whether mpirun starts ranks."""
    probed = probe()
    yield from check_packages(probed)
    yield _torchvision()
    yield from check_gpu(probed)
    yield _mpirun()


def probe() -> dict[str, Any]:
    """What `probe.py` printed; `crash` is how its process ended if it printed nothing."""
    done = subprocess.run(
        [*PYTHON, "-W", "ignore", "-m", "hpc_absa.doctor.probe"],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=os.environ | mpi_environment(),
        check=False,
    )
    try:
        probed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return probed
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"crash": f"exit status {done.returncode}, {last}"}


def check_rehearsal(job: Job) -> Finding:
    """Whether the job's model, loss and data do what a run needs: `training.rehearsal`."""
    name = "rehearsal"
    command = [*PYTHON, "-W", "ignore", "-m", "hpc_absa.doctor.rehearsal"]
    try:
        done = subprocess.run(
            command,
            input=config.dump(job),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=REHEARSAL_SECONDS,
            check=False,
        )
        result = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        detail = f"one microbatch has taken more than {REHEARSAL_SECONDS} s"
        return Finding(name, "error", detail, "lower train.microbatch, or use a smaller model")
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        detail = f"it ended its process: exit status {done.returncode}, {last}"
        return Finding(name, "error", detail, "run the builder of data and model in Python alone")
    if "warning" in result:
        return Finding(name, "warning", result["warning"], result["fix"])
    if "error" in result:
        return Finding(name, "error", result["error"], "change the job, or the code that it names")
    memory = f"{size(result['memory'])} of memory"
    if "gpu_memory" in result:
        memory += f" and {size(result['gpu_memory'])} on the GPU"
    seconds = f"{result['seconds']:.1f} s"
    detail = f"one microbatch of {job.model.name} took {seconds}; a rank needs {memory}"
    return Finding(name, "ok", detail)


def check_packages(probed: dict[str, Any]) -> Iterator[Finding]:
    """Whether the packages import, and whether all of them use one MPI library."""
    if crash := probed.get("crash"):
        detail = f"importing the packages ended the process: {crash}"
        yield Finding("imports", "error", detail, REBUILD)
        return
    packages = {name: probed[name] for name in ("torch", "h5py", "mpi4py")}
    failed = {name: p["error"] for name, p in packages.items() if "error" in p}
    for name, error in failed.items():
        yield Finding(name, "error", error, f"install it into {sys.prefix}, or {REBUILD}")
    if not failed:
        versions = ", ".join(f"{name} {p['version']}" for name, p in packages.items())
        yield Finding("imports", "ok", versions)
    if error := probed["horovod"].get("error") or probed["horovod.torch"].get("error"):
        fix = f"{REBUILD}; a plain `pip install horovod` does not compile"
        yield Finding("horovod", "error", error, fix)
    else:
        built = [name.upper() for name, present in probed["built"].items() if present]
        yield require(
            "horovod over MPI",
            probed["built"]["mpi"],
            f"Horovod {probed['horovod']['version']}, built "
            + (f"with {', '.join(built)}" if "MPI" in built else "without MPI"),
            "remove its wheel (pip uninstall horovod), have mpicc on PATH or HPC_ABSA_MPI=package, "
            "and run launch/bootstrap.sh",
        )
    libraries = probed["libmpi"]
    yield require(
        "one MPI",
        len(libraries) == 1,
        f"loaded by Horovod and mpi4py: {' and '.join(libraries) or 'no libmpi'}",
        "unset MPI4PY_LIBMPI and LD_LIBRARY_PATH, load the MPI module that the environment was "
        "built with, or build it again: launch/bootstrap.sh",
    )


def _torchvision() -> Finding:
    """Compares versions in the packages' metadata, without importing them."""
    name = "torchvision fits torch"
    try:
        torch, torchvision = metadata.version("torch"), metadata.version("torchvision")
        requirements = metadata.requires("torchvision") or []
    except metadata.PackageNotFoundError as error:
        return Finding(name, "error", f"{error.name} is not installed", REBUILD)
    pins = (re.match(r"torch\s*\(?==\s*([\w.]+)", requirement) for requirement in requirements)
    pinned = next((pin[1] for pin in pins if pin), None)
    return require(
        name,
        pinned in (None, torch.split("+")[0]),
        f"torchvision {torchvision} requires torch {pinned or ''}; installed is {torch}",
        f"pip install torch=={pinned}, or the torchvision that goes with {torch}",
    )


def check_gpu(probed: dict[str, Any]) -> Iterator[Finding]:
    """Whether torch and Horovod can use the GPUs that `nvidia-smi -L` lists."""
    tool = shutil.which("nvidia-smi")
    listed = (
        subprocess.run([tool, "-L"], capture_output=True, encoding="utf-8", errors="replace")
        if tool
        else None
    )
    gpus = sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed else 0
    if not gpus:
        yield Finding("gpu", "ok", "no GPU in this machine (nvidia-smi -L lists none)")
        return
    yield require(
        "torch on the GPU",
        probed.get("gpus"),
        f"torch sees {probed.get('gpus', 0)} of {gpus} GPUs, built for CUDA {probed.get('cuda')}",
        "install a CUDA build of torch; check the driver and CUDA_VISIBLE_DEVICES",
    )
    nccl = probed.get("built", {}).get("nccl")
    yield advise(
        "horovod on the GPU",
        nccl,
        "gradients are reduced with NCCL"
        if nccl
        else "Horovod was built without NCCL: gradients are copied to host memory",
        "make setup HOROVOD_GPU_OPERATIONS=NCCL, with nvcc and NCCL installed",
    )


def _mpirun() -> Finding:
    name = "mpirun starts ranks"
    try:
        mpirun = program("mpirun")
    except UsageError as error:
        return Finding(name, "error", str(error), "make setup, or load your site's MPI module")
    code = (
        "from mpi4py import MPI; n = MPI.COMM_WORLD.allreduce(1);"
        "raise SystemExit(n != 2 and f'MPI_COMM_WORLD has size {n}, expected 2')"
    )
    try:
        done = subprocess.run(
            [mpirun, "--oversubscribe", "-np", "2", *PYTHON, "-c", code],
            env=os.environ | mpi_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=60,
            check=False,
        )
        succeeded = done.returncode == 0  # not by the output: the ranks' lines may be mixed
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip(" -")]
        result = "started two ranks" if succeeded else " ".join(lines[:2]) or "no output"
    except subprocess.TimeoutExpired:
        succeeded, result = False, "two ranks did not connect within 60 s"
    return require(
        name,
        succeeded,
        f"{mpirun}: {result}",
        "look for OMPI_MCA_ variables and ~/.openmpi/mca-params.conf, and try `mpirun -np 2 "
        "hostname`; on a login node where mpirun is forbidden, run the check in a job",
    )
