"""Samples per second in training against DDP (gloo), Horovod and Lightning, on 1, 2 and 4 ranks.

usage: python -m benchmarks.training [--quick] [--rounds N] [--models NAME...] [--ranks N...]

All contenders train at the same time in their own processes, but all ranks of all but one are
stopped (SIGSTOP): so turns of seconds are interleaved without a start for each. Of a turn, the
first two steps do not count.
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks import results
from benchmarks.training.workloads import MODELS, job
from hpc_absa.data.prepare import pack
from hpc_absa.supervisor.launchers import mpi_environment, program

OURS, SCRIPT = "hpc-absa, a job file", "hpc-absa, a script"
HOROVOD = "Horovod"
YIELD = "OMPI_MCA_mpi_yield_when_idle"
"""Without it Horovod takes a third of each core from training: `hpc_absa.comm.SETTINGS`."""
TURN_SECONDS, TURN_STEPS = 3.0, 6
"""A turn has at least so many of both, beside the steps that do not count."""
START_SECONDS = 240.0


class World:
    """The ranks of one contender."""

    def __init__(self, contender: str, ranks: int, path: Path, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        python = [sys.executable, "-m"]
        worker = ["benchmarks.training.worker", contender, str(path), str(folder)]
        environment = {**os.environ, **mpi_environment(), "OMP_NUM_THREADS": "1", YIELD: "1"}
        if contender in ("ours", "script", "horovod"):
            words = [program("mpirun"), "-np", str(ranks), "--bind-to", "none", "--oversubscribe"]
            words += [*python, *worker]
        elif ranks > 1 or contender == "ddp":
            words = [*python, "torch.distributed.run", "--standalone"]
            words += ["--nproc-per-node", str(ranks), "-m", *worker]
        else:
            words = [*python, *worker]
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            words,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=results.ROOT,
            start_new_session=True,
        )
        self._wait_for_steps(5)
        self._signal(signal.SIGSTOP)

    def _stamps(self) -> list[float]:
        file = self._folder / "steps"
        content = file.read_bytes() if file.exists() else b""
        return list(struct.unpack(f"{len(content) // 8}d", content[: len(content) // 8 * 8]))

    def _wait_for_steps(self, count: int) -> None:
        until = time.monotonic() + START_SECONDS
        while len(self._stamps()) < count:
            if self._process.poll() is not None or time.monotonic() > until:
                self.close()
                lines = (self._folder / "log").read_text().splitlines()
                errors = [line for line in lines if "Error: " in line] or lines
                raise RuntimeError(f"did not train: {''.join(errors[-1:])[-300:]}")
            time.sleep(0.1)

    def _pids(self) -> list[int]:
        return [int(file.read_text()) for file in self._folder.glob("pid-*")]

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._pids():
            os.kill(pid, number)

    def _cpu_seconds(self) -> float:
        """Of all ranks so far."""
        ticks = 0
        for pid in self._pids():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def turn(self, batch: int) -> results.Numbers:
        """Speed, and CPU time of all ranks; `batch` is the number of samples of a step."""
        before, begin, cpu = len(self._stamps()), time.monotonic(), self._cpu_seconds()
        self._signal(signal.SIGCONT)
        while True:
            time.sleep(0.05)
            if self._process.poll() is not None:
                raise RuntimeError("ended")
            steps = len(self._stamps()) - before
            if time.monotonic() - begin > TURN_SECONDS and steps >= TURN_STEPS + 2:
                break
        self._signal(signal.SIGSTOP)
        stamps, cpu = self._stamps()[before:], self._cpu_seconds() - cpu
        counted = stamps[2:]
        speed = (len(counted) - 1) / (counted[-1] - counted[0])
        return {"samples": batch * speed, "CPU": 1e3 * cpu / (batch * len(stamps))}

    def close(self) -> None:
        for pid in [*self._pids(), self._process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()


@contextmanager
def worlds(
    table: results.Comparison, model: str, ranks: int, folder: Path, quick: bool
) -> Iterator[dict[str, World]]:
    """Started and stopped again, one by one; one that does not start is a problem of the table."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    contiguous = model != "transformer"
    kinds = {
        OURS: "ours",
        SCRIPT: "script",
        "PyTorch alone": "plain",
        "DDP (gloo)": "ddp",
        "Lightning": "lightning",
        HOROVOD: "horovod",
    }
    if ranks > 1:
        del kinds["PyTorch alone"]
    if quick:
        del kinds[SCRIPT]
    started: dict[str, World] = {}
    try:
        for name, kind in kinds.items():
            channels_last = not (kind == "horovod" and contiguous)
            path = folder / f"{model}-{ranks}-{kind}.toml"
            path.write_text(job(model, ranks, threads, str(folder), channels_last))
            try:
                started[name] = World(kind, ranks, path, folder / path.stem)
            except (OSError, RuntimeError) as error:
                table.problems[name] = str(error)
        yield started
    finally:
        for world in started.values():
            world.close()


def compare(model: str, ranks: int, folder: Path, rounds: int, quick: bool) -> results.Comparison:
    measures = {
        "samples": results.Measure("1/s", "higher"),
        "CPU": results.Measure("ms a sample", "lower"),
    }
    title = f"{model}, {ranks} {'rank' if ranks == 1 else 'ranks'}"
    microbatch = MODELS[model][0]
    note = f"Microbatch {microbatch}, {microbatch * ranks} samples a step, float32."
    if model != "transformer":
        note += f" channels_last; {HOROVOD} refuses it, and has contiguous tensors."
    table = results.Comparison(title, measures, OURS, not_peers=(SCRIPT,), note=note)
    with worlds(table, model, ranks, folder, quick) as started:
        batch = microbatch * ranks
        turns = {name: lambda world=world: world.turn(batch) for name, world in started.items()}
        table.run(turns, rounds)
    return table


def main() -> None:
    parser = results.options(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    options = parser.parse_args()
    models, ranks = options.models, options.ranks
    rounds = options.rounds
    if options.quick:
        models, ranks = [name for name in models if name != "ResNet-18"], [2]
        rounds = min(rounds, 3)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no stopped rank remains
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pack("benchmarks.training.workloads:images", None, {}, folder / "images.h5")
        tables = [
            compare(model, size, folder, rounds, options.quick)
            for model in models
            for size in ranks
        ]
    print(f"{time.monotonic() - begin:.0f} s", file=sys.stderr)
    results.write("training", tables, options, packages=("lightning",))


if __name__ == "__main__":
    main()
