"""A request to stop: a flag set by signals or by a file, acted on only when all ranks agree."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

import torch

from hpc_absa.comm import Communicator

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Whether this rank has been asked to stop, and whether any rank has."""

    def __init__(self, comm: Communicator, file: Path) -> None:
        """`file` is looked for by rank 0 alone: launchers differ in the signals they pass on."""
        self._comm = comm
        self._file = file
        self._signalled = False
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def here(self) -> bool:
        """Whether this rank knows of a request; no collective."""
        return self._signalled or (self._comm.rank == 0 and self._file.exists())

    def agreed(self) -> bool:
        """Whether any rank knows of a request: the same answer on every rank (a collective)."""
        flag = torch.tensor([float(self.here())], dtype=torch.float64)
        return bool(self._comm.sum_(flag).item())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
