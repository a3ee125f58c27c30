"""Starts the fork server: ranks are forked from a process that has imported what they need.

A launch then takes what the launcher and MPI take; the imports, most of a start, happened before.
mpirun starts `forked_rank.py`, which asks the server, over a socket of this host, for the rank.
Where no server answers, the rank is executed.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hpc_absa.rundir import RunDir
from hpc_absa.supervisor import forked_rank
from hpc_absa.supervisor.launchers import Command
from hpc_absa.supervisor.process import PYTHON

MODULE = "hpc_absa.supervisor.forking"
PRELOADED = ("hpc_absa.cli", "hpc_absa.training.rank", "horovod.torch", "scipy.special")
OF_SCRIPTS = ("torch._dynamo",)
"""What the first step of torch's own optimizers imports (`training.optimizer`), in 1.3 s."""


class ForkServer:
    """The server of one supervisor, which ends with it once its ranks have ended."""

    def __init__(self, run: RunDir, modules: tuple[str, ...] = ()) -> None:
        """`modules` are imported besides `PRELOADED`."""
        self._run, self._modules = run, modules
        self._process: subprocess.Popen[bytes] | None = None
        self._address = ""

    def _start(self, environment: Mapping[str, str]) -> None:
        """Start the server, unless it is running; `environment` is what its imports may read."""
        if self._process and self._process.poll() is None:
            return
        self.close()
        self._address = f"hpc-absa-{secrets.token_hex(16)}"
        with socket.socket(socket.AF_UNIX) as listener:
            # In the abstract namespace there is no file to remove. Ranks wait in the queue for a
            # server that still imports.
            listener.bind(f"\0{self._address}")
            listener.listen(4096)
            words = [*PYTHON, "-m", MODULE, str(listener.fileno()), str(self._run.path)]
            self._process = subprocess.Popen(
                [*words, *PRELOADED, *self._modules],
                env=os.environ | environment,
                stdin=subprocess.PIPE,  # its end of file: the supervisor has ended
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=(listener.fileno(),),
            )

    def address(self, worker: Command) -> str:
        """Of the server, for a worker that can be forked; otherwise empty."""
        if not _can_run(worker):
            return ""
        self._start(worker.environment)
        return self._address

    def close(self, ranks_ended: bool = True) -> None:
        """End the server: now, or by itself once its last rank has ended."""
        if self._process:
            assert self._process.stdin
            if ranks_ended:
                self._process.kill()
                self._process.wait()
            self._process.stdin.close()
            self._process = None


def represented(worker: Command, run: RunDir, address: str) -> Command:
    """`worker` below a process of ours, forked from the server at `address` if there is one."""
    stub = (sys.executable, "-I", "-S", str(Path(forked_rank.__file__)))
    return replace(worker, words=(*stub, address, str(run.failure.resolve()), *worker.words))


def _can_run(worker: Command) -> bool:
    """Whether `forking.run` does what the command does: this Python, without other options."""
    program, first = Path(worker.words[0]), (*worker.words, "")[1]
    same = program.parent == Path(sys.executable).parent and program.name.startswith("python")
    return same and (first in ("-P", "-m") or first.endswith(".py"))
