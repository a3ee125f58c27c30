"""How each system starts a script, and how its operator takes ranks away and adds them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.faults import trace
from hpc_absa.rundir.events import EventLog

HERE, BIN = Path(__file__).parent, Path(sys.executable).parent
DETECTION = 20
"""Seconds without an answer after which a rank has failed, in each system with such a setting."""


RENDEZVOUS = "--rdzv-conf=last_call_timeout=1,keep_alive_interval=1"
"""Fewer agents than the most wait one second for others instead of 30, and an agent that ended is
noticed after three seconds instead of 15."""


class System:
    """One run in `folder`."""

    name = ""
    script = ""
    """Module of this folder that trains the small model."""
    example = ""
    """File, from the repository's root, that trains the model of examples/language_model.py."""
    runs_example = False
    writes_files = True
    """Checkpoints."""

    def __init__(self, folder: Path, epochs: int, pace: float, events: str = "") -> None:
        self.folder, self.epochs = folder, epochs
        self.processes: list[subprocess.Popen[bytes]] = []
        paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
        self.environment = os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            # With a shared store (torch 2.13), an agent that joins later waits without end.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "TRACE": str(folder / "trace"),
            "EPOCHS": str(epochs),
            "PACE": str(pace),
            "EVENTS": events,
        }
        folder.mkdir(exist_ok=True)

    @property
    def module(self) -> list[str]:
        if self.runs_example:
            example = str(HERE.parents[1] / self.example)
            return ["-m", "benchmarks.faults.victim", example, str(self.folder / "saved")]
        return ["-m", f"benchmarks.faults.{self.script}", str(self.folder)]

    def start(self, ranks: int) -> None:
        raise NotImplementedError

    def resize(self, ranks: int) -> None:
        raise NotImplementedError

    def spawn(self, *words: str) -> None:
        with (self.folder / "output").open("ab") as output:
            options = {"env": self.environment, "stdout": output, "stderr": output}
            self.processes.append(
                subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True, **options)  # type: ignore[call-overload]
            )

    def records(self) -> list[dict]:
        return trace.records(self.folder / "trace")

    def step(self) -> int:
        """The newest one."""
        steps = [record["step"] for record in self.records() if "step" in record]
        return steps[-1] if steps else 0

    def test_loss(self) -> str:
        """The last one that the example printed."""
        losses = re.findall(r"loss (\d+\.\d+)", (self.folder / "output").read_text())
        return losses[-1] if losses else "none"

    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def interrupt(self) -> None:
        """Ask it to end, as a scheduler does."""
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        self.wait(120)

    def wait(self, seconds: float) -> str:
        """How it ended; what is left of it is killed."""
        end = time.monotonic() + seconds
        while self.running() and time.monotonic() < end:
            time.sleep(0.05)
        hangs = self.running()
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for pid in self._left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if hangs:
            return f"hangs for {seconds:.0f} s"
        status = max((process.returncode for process in self.processes), key=abs)
        return "done" if status == 0 else f"exit status {status}"

    def _left(self) -> list[int]:
        """Ranks that their launcher has left."""
        mine, found = f"TRACE={self.folder}/trace".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mine in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found


class HpcAbsa(System):
    name, script = "hpc_absa", "launched"
    example = "examples/language_model.py"

    def start(self, ranks: int) -> None:
        options = [f"--ranks={ranks}", f"--max-ranks={ranks}", f"--run-dir={self.folder}/run"]
        options += [f"--set=launch.heartbeat_timeout={DETECTION}", "--allow-changed=command"]
        options += ["--set=launch.fork_server=true"]
        launch = [sys.executable, "-m", "hpc_absa", "launch", *options]
        self.spawn(*launch, "--", "python", *self.module)

    def test_loss(self) -> str:
        """The last one of its events; the output has the training loss."""
        event = EventLog(self.folder / "run/events.jsonl").last("epoch")
        return f"{event['test_loss']:.4f}" if event else "none"

    def resize(self, ranks: int) -> None:
        self.interrupt()
        self.processes.clear()
        self.start(ranks)


class Torchrun(System):
    """One agent for all ranks; where their number changes, an agent (a node) for each."""

    name, script = "torchrun + DCP", "torchrun"
    example = "benchmarks/library/language_model_torchrun.py"
    port = 0

    def start(self, ranks: int) -> None:
        if "ranks=" not in self.environment["EVENTS"]:
            options = ["--standalone", f"--nproc-per-node={ranks}", "--max-restarts=3"]
            self.spawn(str(BIN / "torchrun"), *options, *self.module)
            return
        if not self.port:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                self.port = free.getsockname()[1]
        self._join()
        while self.running() and not self._listens():  # the first agent has the store
            time.sleep(0.1)
        self.resize(ranks)

    def _listens(self) -> bool:
        with socket.socket() as one:
            return one.connect_ex(("localhost", self.port)) == 0

    def _join(self) -> None:
        options = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-id=1"]
        options += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{self.port}", RENDEZVOUS]
        self.spawn(str(BIN / "torchrun"), *options, "--local-addr=localhost", *self.module)

    def resize(self, ranks: int) -> None:
        while len(self.processes) > ranks:
            leaving = self.processes.pop()
            leaving.send_signal(signal.SIGTERM)
            leaving.wait()
        while len(self.processes) < ranks:
            self._join()


class Lightning(Torchrun):
    name, script, example = "Lightning", "lightning_ddp", ""


class HorovodElastic(System):
    """Two hosts, both this machine under two names."""

    name, script = "Horovod Elastic", "horovod_elastic"
    example = "benchmarks/library/language_model_horovod.py"
    writes_files = False

    def start(self, ranks: int) -> None:
        for name in ("GLOO_TIMEOUT", "STALL_CHECK_TIME", "STALL_SHUTDOWN_TIME"):
            self.environment[f"HOROVOD_{name}_SECONDS"] = str(DETECTION)
        discovery = self.folder / "discover"
        discovery.write_text(f"#!/bin/sh\ncat {self.folder}/hosts\n")
        discovery.chmod(0o755)
        self.resize(ranks)
        options = ["-np", str(ranks), "--min-np", "1", "--max-np", "2", "--network-interface", "lo"]
        options += ["--host-discovery-script", str(discovery)]
        # Without these seconds a host whose rank was killed is never used again.
        options += ["--blacklist-cooldown-range", "1", "2"]
        self.spawn(str(BIN / "horovodrun"), *options, sys.executable, *self.module)

    def resize(self, ranks: int) -> None:
        hosts = ("localhost:1\n", "127.0.0.1:1\n")[:ranks]
        (self.folder / "hosts.new").write_text("".join(hosts))
        (self.folder / "hosts.new").replace(self.folder / "hosts")


SYSTEMS: dict[str, type[System]] = {
    cls.name: cls for cls in (HpcAbsa, HorovodElastic, Torchrun, Lightning)
}
