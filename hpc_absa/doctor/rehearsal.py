"""The rehearsal of a job on one rank, in a separate process: it imports torch and the user's code.

usage: python -m hpc_absa.doctor.rehearsal < JOB

JOB is the resolved job. Prints one JSON object with `seconds` and `memory` (bytes of the process,
and `gpu_memory`), with `error`, or with `warning` and its `fix` where nothing can be tried yet.
"""

from __future__ import annotations

import io
import json
import os
import resource
import shlex
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch

from hpc_absa import config, plugins
from hpc_absa.comm import SerialCommunicator
from hpc_absa.config import Job
from hpc_absa.errors import HpcAbsaError, UsageError
from hpc_absa.rundir import RunDir
from hpc_absa.training.clock import Clock
from hpc_absa.training.data import packed_path
from hpc_absa.training.faults import StopRequest
from hpc_absa.training.named import require_buildable
from hpc_absa.training.rehearsal import rehearse
from hpc_absa.training.setup import build_trainer


def rehearse_job(job: Job) -> dict[str, object]:
    """Build everything that the job names, with its initial weights, and rehearse."""
    with tempfile.TemporaryDirectory(prefix="hpc-absa-doctor-") as folder:
        run = RunDir(Path(folder)).create()
        try:
            own_data = plugins.is_reference(job.data.name) or job.data.name == "digits"
            if not own_data and not packed_path(job, run).exists():
                return _without_data(job)
            return _rehearse(job, run)
        except HpcAbsaError as error:
            return {"error": str(error)}


def _rehearse(job: Job, run: RunDir) -> dict[str, object]:
    comm = SerialCommunicator()
    stop = StopRequest(comm, run.stop_request)
    trainer = build_trainer(job, run, comm, Clock(), stop, io.StringIO(), ())
    device = trainer.run.engine.device
    begin = time.perf_counter()
    rehearse(trainer)
    seconds = time.perf_counter() - begin
    memory = {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        memory["gpu_memory"] = torch.cuda.max_memory_allocated(device)
    return {"seconds": seconds, **memory}


def _without_data(job: Job) -> dict[str, object]:
    """Check the rest of a job whose data set is not packed yet."""
    root = Path(os.path.expanduser(job.data.root))
    if not job.data.root or not root.exists():
        problem = "no such file or folder" if job.data.root else "not set"
        raise UsageError(
            f"data.root = {job.data.root!r}: {problem}; expected the folder of {job.data.name}, "
            "or the file that `hpc-absa data` writes"
        )
    require_buildable(job)
    words = ["hpc-absa", "data", job.data.name, "--root", str(root)]
    for key, value in job.data.arguments.items():
        words.append(f"--{key.replace('_', '-')}")
        words += [] if value is True else [str(value)]
    return {
        "warning": f"{root} is not packed yet, so that no microbatch was tried; "
        "model, loss and schedule can be built",
        "fix": shlex.join(words),
    }


def main() -> None:
    job = config.parse(sys.stdin.read(), "the job", warn=False)
    with redirect_stdout(sys.stderr):  # what the user's code prints
        result = rehearse_job(job)
    print(json.dumps(result), flush=True)
    os._exit(0)  # without waiting for threads of the user's code


if __name__ == "__main__":
    main()
