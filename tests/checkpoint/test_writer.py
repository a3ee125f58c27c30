"""The process that writes: its death is an error, and it never outlives its rank."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from hpc_absa.checkpoint import async_checkpointer, file
from hpc_absa.checkpoint.writer import NICENESS
from hpc_absa.errors import CollectiveError
from tests.checkpoint.test_async_checkpointer import Setup


@pytest.fixture(name="setup")
def _setup(tmp_path, monkeypatch):
    """A checkpointer that leaves even small states to the process, which has been started."""
    monkeypatch.setattr(async_checkpointer, "WRITER_BYTES", 0)
    setup = Setup(tmp_path)
    setup.save(1)
    assert setup.checkpointer.settle()
    yield setup
    setup.checkpointer.close()


def process(setup):
    return psutil.Process(setup.checkpointer._writer.pid)


def stopped(setup):
    """Whether the process stands still, after SIGSTOP."""
    return process(setup).status() == psutil.STATUS_STOPPED


def wait_until(condition):
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_state_at_the_time_of_the_call_is_saved(setup):
    process(setup).suspend()
    wait_until(lambda: stopped(setup))
    setup.save(2)
    setup.tensors["model", "w"].add_(1)
    assert setup.checkpointer.flags() == (True, False), "training continues"
    assert setup.steps() == [1]
    process(setup).resume()
    assert setup.checkpointer.settle()
    for step in (1, 2):
        arrays = file.read(setup.path(step)).groups["model"].arrays
        np.testing.assert_array_equal(arrays["w"], np.arange(6, dtype=np.float32))


def test_it_yields_to_training_and_leaves_signals_to_the_rank(setup):
    writer = process(setup)
    assert writer.nice() == os.nice(0) + NICENESS
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        writer.send_signal(number)
    setup.save(2)
    assert setup.checkpointer.settle()
    assert process(setup) == writer


def test_its_death_is_an_error_and_the_next_save_starts_another(setup):
    process(setup).suspend()
    wait_until(lambda: stopped(setup))
    setup.save(2)
    process(setup).kill()
    setup.checkpointer.wait()
    assert setup.checkpointer.flags() == (True, True)
    with pytest.raises(CollectiveError, match=r"step-0000000002.*died \(SIGKILL\).*async = false"):
        setup.checkpointer.update(1, 1)
    assert setup.steps() == [1]
    setup.save(3)
    assert setup.checkpointer.settle()
    process(setup).kill()
    wait_until(lambda: ended(process(setup).pid))
    setup.save(4)
    assert setup.checkpointer.settle()
    assert setup.steps() == [1, 3, 4]


def test_its_errors_are_those_of_a_write_in_this_process(setup, tmp_path):
    setup.path(2).mkdir()
    setup.save(2)
    with pytest.raises(CollectiveError, match=r"step-0000000002.*: Is a directory"):
        setup.checkpointer.settle()
    assert not [path.name for path in tmp_path.glob(".*")], "no temporary file remains"


def test_a_file_that_cannot_be_begun_does_not_end_it(setup, tmp_path):
    writer, elsewhere = process(setup), tmp_path.with_name("elsewhere")
    tmp_path.rename(elsewhere)
    setup.save(2)
    with pytest.raises(CollectiveError, match=r"step-0000000002.*: No such file"):
        setup.checkpointer.settle()
    elsewhere.rename(tmp_path)
    setup.save(3)
    assert setup.checkpointer.settle()
    assert setup.steps() == [1, 3]
    assert process(setup) == writer


def test_training_that_waits_has_the_rank_write(setup):
    process(setup).suspend()
    setup.save(2, training=False)
    assert setup.checkpointer.settle()
    process(setup).resume()


def ended(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


PARENT = """
import os, sys, time
from pathlib import Path
from hpc_absa.checkpoint.writer import SharedMemory, Writer

writer = Writer(SharedMemory())
writer.start()
assert "torch" not in sys.modules
print(writer.pid, flush=True)
time.sleep(60)
"""


def test_it_ends_with_a_rank_that_is_killed():
    """Also while it writes: a later attempt must not see it publish."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        pid = int(parent.stdout.readline())
        wait_until(lambda: psutil.Process(pid).nice() == os.nice(0) + NICENESS)
        os.kill(pid, signal.SIGSTOP)
        parent.kill()
        wait_until(lambda: ended(pid))
