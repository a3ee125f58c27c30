"""The time that torchrun and Horovod Elastic need from a request for more ranks to a step on them.

Each trains one small layer in steps of 0.1 s. The operator starts a second torchrun agent, or
changes the list of hosts; a rank that has taken a step writes how many there are.

    python -m benchmarks.startup.rivals torchrun|elastic TRACE     (one rank, started by them)
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.results import ROOT, Numbers

BIN = Path(sys.executable).parent
SECONDS = 120.0
"""To wait for a step."""


def torchrun(before: int, after: int) -> Numbers:
    """Two agents; the second one joins, and all workers are started again."""
    assert after == 2 * before
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = [str(BIN / "torchrun"), "--nnodes=1:2", f"--nproc-per-node={before}", "--rdzv-id=1"]
    words += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--local-addr=localhost"]
    # The agent looks for new ones so often; its default is 5 s, or 0.1 s in later releases.
    words += ["--monitor-interval=0.1", "--max-restarts=3"]
    # The first agent starts alone after so long instead of 30 s, which are not measured.
    words += ["--rdzv-conf=last_call_timeout=1"]

    def start(folder: Path) -> list[str]:
        return [*words, "-m", "benchmarks.startup.rivals", "torchrun", str(folder / "trace")]

    return _grow(start, lambda folder: start(folder), before, after)


def horovod_elastic(before: int, after: int) -> Numbers:
    """The list of hosts, which Horovod reads each second, gets more slots."""

    def start(folder: Path) -> list[str]:
        _hosts(folder, before)
        (folder / "discover").write_text(f"#!/bin/sh\ncat {folder}/hosts\n")
        (folder / "discover").chmod(0o755)
        words = [str(BIN / "horovodrun"), "-np", str(before), "--min-np", str(before)]
        words += ["--max-np", str(after), "--network-interface", "lo"]
        words += ["--host-discovery-script", str(folder / "discover"), sys.executable]
        return [*words, "-m", "benchmarks.startup.rivals", "elastic", str(folder / "trace")]

    return _grow(start, lambda folder: _hosts(folder, after), before, after)


def _hosts(folder: Path, slots: int) -> None:
    (folder / "new").write_text(f"localhost:{slots}\n")
    (folder / "new").replace(folder / "hosts")


def _grow(
    start: Callable[[Path], list[str]],
    grow: Callable[[Path], list[str] | None],
    before: int,
    after: int,
) -> Numbers:
    """Start with `before` ranks; `grow` does what an operator does, or returns what they start."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        # With a shared store (torch 2.13), an agent that joins waits for an address that the first
        # one only wrote in its own first round: both end with a timeout.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    processes = []

    def launch(words: list[str]) -> None:
        processes.append(
            subprocess.Popen(
                words,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )

    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        try:
            launch(start(folder))
            _step_with(folder / "trace", before)
            time.sleep(1.0)
            begin = time.time()
            if words := grow(folder):
                launch(words)
            return {"seconds": _step_with(folder / "trace", after) - begin}
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            for process in processes:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    pass
                finally:
                    _kill_session(process.pid)
                    process.wait()


def _kill_session(leader: int) -> None:
    """What an agent has left."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader:
                os.kill(int(path.parent.name), signal.SIGKILL)
        except (OSError, IndexError):
            continue


def _step_with(trace: Path, ranks: int) -> float:
    """Unix time of the first step with so many ranks."""
    end = time.time() + SECONDS
    while time.time() < end:
        for line in trace.read_text().splitlines() if trace.exists() else []:
            size, _, at = line.partition(" ")
            if int(size) == ranks and at:
                return float(at)
        time.sleep(0.02)
    raise TimeoutError(f"no step with {ranks} ranks in {SECONDS:.0f} s")


def record(trace: str, rank: int, size: int) -> None:
    if rank == 0:
        with open(trace, "a") as file:
            file.write(f"{size} {time.time():.6f}\n")
    time.sleep(0.1)


def train_under_torchrun(trace: str) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 10))
    while True:
        model(torch.ones(8, 64)).sum().backward()
        record(trace, dist.get_rank(), dist.get_world_size())


def train_under_horovod(trace: str) -> None:
    import horovod.torch as hvd
    import torch

    hvd.init()
    model = torch.nn.Linear(64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())

    @hvd.elastic.run
    def train(state):  # type: ignore[no-untyped-def]
        while True:
            optimizer.zero_grad()
            model(torch.ones(8, 64)).sum().backward()
            optimizer.step()
            record(trace, hvd.rank(), hvd.size())
            state.commit()

    train(hvd.elastic.TorchState(model, optimizer))


if __name__ == "__main__":
    {"torchrun": train_under_torchrun, "elastic": train_under_horovod}[sys.argv[1]](sys.argv[2])
