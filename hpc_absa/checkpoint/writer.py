"""A process that writes a rank's checkpoints while the rank trains.

It has an interpreter lock of its own and a low priority: where all cores are busy, it takes a
twentieth of one. Both processes map the memory with the state. It ends when the thread ends that
started it.
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import numpy as np

from hpc_absa.checkpoint import file
from hpc_absa.checkpoint.format import Content, Place, Written
from hpc_absa.errors import CheckpointError
from hpc_absa.parent_death import end_with_parent

NICENESS = 13
"""The weight of a process of this niceness is 56, that of an ordinary one 1,024."""


class SharedMemory:
    """Memory that a child process can map. It never shrinks: new pages are what a copy waits for.

    0.8 GB/s into new pages, 12 GB/s into existing ones (AMD EPYC, virtual machine).
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = os.memfd_create("checkpoint") if descriptor is None else descriptor
        self.mapped = np.empty(0, np.uint8)

    def map(self, size: int) -> np.ndarray:
        """At least the first `size` bytes; not the same array where there were fewer."""
        if len(self.mapped) < size:
            if os.fstat(self.descriptor).st_size < size:
                os.ftruncate(self.descriptor, size)
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            self.mapped = np.frombuffer(mmap.mmap(self.descriptor, size, flags), np.uint8)
        return self.mapped

    def __del__(self) -> None:
        os.close(self.descriptor)


class Writer:
    """`file.write` in a process of its own, for arrays in shared memory."""

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process; None before it was started."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process, unless it runs.

        Raises:
            OSError: it cannot be started.
        """
        if self._process and self._process.poll() is None:
            return
        self._channel, theirs = Pipe()
        descriptors = theirs.fileno(), self._memory.descriptor
        words = [sys.executable, "-P", "-m", __name__, *map(str, descriptors), str(os.getpid())]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OPENBLAS_NUM_THREADS": "1",
            "MPI4PY_RC_INITIALIZE": "0",  # an h5py with MPI would join the job as another rank
        }
        # It must not end, and not with a save half done, by a signal that is meant for the rank.
        # The same session: niceness compares processes within one only (CONFIG_SCHED_AUTOGROUP).
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._process = subprocess.Popen(
                words,
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                env=environment,
                process_group=0,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()

    def write(
        self,
        path: Path,
        content: Content,
        shards: tuple[Written, ...] = (),
        ready: Callable[[], object] = bool,
    ) -> Written:
        """As `file.write`, which also raises where the process died."""
        start = self._memory.mapped.ctypes.data
        places = {
            key: Place(array.dtype.str, array.shape, array.ctypes.data - start)
            for key, array in content.arrays().items()
        }
        assert self._process
        try:
            self._channel.send((path, content.scalars(), places, shards))
            try:
                ready()
            except BaseException:
                self._process.kill()
                raise
            self._channel.send(None)
            answer = self._channel.recv()
        except (EOFError, OSError):
            raise CheckpointError(
                f"{path}: cannot be written: the process that writes checkpoints died "
                f"({_reason(self._process.wait())}); checkpoint.async = false writes without one"
            ) from None
        if isinstance(answer, CheckpointError):
            raise answer
        return answer

    def close(self) -> None:
        """End the process; nothing is being written."""
        if self._process:
            self._channel.close()
            self._process.wait()
            self._process = None


def _reason(status: int) -> str:
    return f"exit status {status}" if status >= 0 else signal.Signals(-status).name


def main(channel: Connection, memory: SharedMemory, parent: int) -> None:
    """Write what `Writer.write` sends, until the other end is closed."""
    end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        return
    os.nice(NICENESS)
    while True:
        try:
            path, scalars, places, shards = channel.recv()
        except EOFError:
            return
        end = max((place.start + place.nbytes for place in places.values()), default=0)
        content = scalars.with_arrays(file.views(memory.map(end), places))
        waited = False

        def ready() -> None:
            nonlocal waited
            waited = True
            channel.recv()

        try:
            channel.send(file.write(path, content, shards, ready))
        except CheckpointError as error:
            if not waited:
                channel.recv()
            channel.send(error)


if __name__ == "__main__":
    ends, descriptor, parent = map(int, sys.argv[1:])
    main(Connection(ends), SharedMemory(descriptor), parent)
