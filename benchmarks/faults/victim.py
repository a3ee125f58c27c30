"""Runs a script whose rank 1 kills itself once, after 20 steps of its optimizer.

usage: python -m benchmarks.faults.victim SCRIPT [ARGUMENT ...]
"""

import os
import runpy
import signal
import sys
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook

RANK = ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "RANK")
steps = 0


def after_step(*_):
    global steps
    steps += 1
    rank = next((os.environ[name] for name in RANK if name in os.environ), "0")
    if steps == 20 and rank == "1" and os.environ["EVENTS"]:
        try:
            Path(f"{os.environ['TRACE']}-killed").touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


register_optimizer_step_post_hook(after_step)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
