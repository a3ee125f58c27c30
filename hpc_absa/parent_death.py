"""Child processes that must not outlive their parent."""

import ctypes
import signal

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """In a child: request a signal when the thread that started it ends, even by SIGKILL."""
    _libc.prctl(PR_SET_PDEATHSIG, number)
