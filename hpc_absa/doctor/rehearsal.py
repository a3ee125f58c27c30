"""The rehearsal of a job on one rank, in a separate process: it imports torch and the user's code.

usage: python -m hpc_absa.doctor.rehearsal < JOB

JOB is the resolved job. Prints one JSON object with `seconds` or `error`, or with `absent`, the
reason why there is nothing to rehearse.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

from hpc_absa import config, plugins
from hpc_absa.comm import SerialCommunicator
from hpc_absa.config import Job
from hpc_absa.errors import HpcAbsaError
from hpc_absa.rundir import RunDir
from hpc_absa.training.clock import Clock
from hpc_absa.training.data import packed_path
from hpc_absa.training.faults import StopRequest
from hpc_absa.training.rehearsal import rehearse
from hpc_absa.training.setup import build_trainer


def rehearse_job(job: Job) -> dict[str, object]:
    """Build everything that the job names, with its initial weights, and rehearse."""
    with tempfile.TemporaryDirectory(prefix="hpc-absa-doctor-") as folder:
        run = RunDir(Path(folder)).create()
        own_data = plugins.is_reference(job.data.name) or job.data.name == "digits"
        if not own_data and not packed_path(job, run).exists():
            return {"absent": f"the data set is not packed yet: hpc-absa data {job.data.name}"}
        comm = SerialCommunicator()
        stop = StopRequest(comm, run.stop_request)
        try:
            trainer = build_trainer(job, run, comm, Clock(), stop, io.StringIO(), ())
            begin = time.perf_counter()
            rehearse(trainer)
        except HpcAbsaError as error:
            return {"error": str(error)}
        return {"seconds": time.perf_counter() - begin}


def main() -> None:
    job = config.parse(sys.stdin.read(), "the job", warn=False)
    with redirect_stdout(sys.stderr):  # what the user's code prints
        result = rehearse_job(job)
    print(json.dumps(result), flush=True)
    os._exit(0)  # without waiting for threads of the user's code


if __name__ == "__main__":
    main()
