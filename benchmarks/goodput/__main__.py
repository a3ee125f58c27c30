"""Throughput that a run keeps while its ranks are killed, stopped and cut off from each other.

    python -m benchmarks.goodput [--minutes 30] [--every 120 30] [--faults kill,stop,partition]

ResNet-8 on images of the size of CIFAR-10's, on two ranks, in steps of 512 images. A rank drawn at
random is killed (SIGKILL) or stopped (SIGSTOP), in turn, at random moments, on average once in
`--every` seconds (a run for each), and at the earliest 15 s after the fault before. `partition`
puts each rank on a host in a network namespace (root; sshd), cuts the link between them for 15 s,
and tries the host that was lost again after 5 s. Throughput is the samples of the steps that count,
divided by the time from the first to the last of them. Undisturbed runs, of a sixth of the length,
are made before, between and after: `kept` is the share of their median. Every rank records the
samples that it draws: `lost` and `repeated` count samples of finished epochs that the weights have
not seen, or saw twice; `redone` are the steps after the checkpoint to which a fault returned the
run. A recovery is the time from a fault to the end of the next step's gradients: with the time
until it is noticed, and with one step.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from benchmarks import results
from benchmarks.goodput.job import TRAINING
from benchmarks.results import Comparison, Measure, Numbers
from tests.soak import ledger
from tests.soak.runs import SoakRun
from tests.soak.watched import FOLDER
from tests.supervisor.two_hosts import ADDRESSES, TwoHosts

JOB = """
name = "goodput"
[data]
name = "benchmarks.goodput.job:images"
[model]
name = "benchmarks.goodput.job:network"
[train]
epochs = 100000
microbatch = 128
lr = 0.05
threads_per_rank = 1
[schedule]
method = "bl"
base_batch = 512
max_batch = 512
[ranks]
initial = {initial}
max = 2
[checkpoint]
every_seconds = {save}
[launch]
max_restarts = 10
heartbeat_timeout = {heartbeat}
{launch}
"""
HOSTS = """
rsh_agent = "{agent}"
interface = "veth0"
cool_down = 5.0
extra = ["-x", "{variable}"]
"""
PARTITION_SECONDS = 15.0
APART = 15.0
"""Seconds between two faults at least."""
MEASURES = {
    "throughput": Measure("samples/s"),
    "kept": Measure("%"),
    "faults": Measure(""),
    "samples lost": Measure(""),
    "repeated": Measure(""),
    "steps redone": Measure(""),
}
RECOVERY = {
    "faults": Measure(""),
    "median": Measure("s"),
    "95 %": Measure("s"),
    "longest": Measure("s"),
}


@dataclass(frozen=True)
class Fault:
    kind: str
    time: float
    """Unix seconds."""
    recovery: float = 0.0
    """Seconds to the next step."""


class Run:
    """One run of the job, with faults or without."""

    def __init__(self, folder: Path, options: argparse.Namespace, hosts: TwoHosts | None) -> None:
        self.options, self.hosts = options, hosts
        folder.mkdir()
        job, launch, words = folder / "job.toml", "", list[str]()
        if hosts:
            launch = HOSTS.format(agent=hosts.agent, variable=FOLDER)
            words = ["-H", ",".join(f"{address}:1" for address in ADDRESSES)]
        fields = {"initial": 1 if hosts else 2, "launch": launch}
        job.write_text(JOB.format(save=options.save, heartbeat=options.heartbeat, **fields))
        self.run = SoakRun(folder, job, *words)
        if hosts:
            self.run.words = hosts.inside(0, *self.run.words)
        self.faults: list[Fault] = []

    def __call__(self, minutes: float, every: float | None = None) -> Numbers:
        """Train, with a fault in `every` seconds on average."""
        self.run.start()
        try:
            self.run.wait_for(lambda: self.pids() and self.run.events("progress"), "a step")
            end = time.time() + 60 * minutes
            draw = random.Random(self.options.seed)
            while every:
                pause = APART + draw.expovariate(1 / max(1.0, every - APART))
                if time.time() + pause > end - APART:
                    break
                self.sleep(pause)
                self.strike(draw)
            self.sleep(end - time.time())
            assert self.run.process is not None
            self.run.process.send_signal(signal.SIGTERM)
            code = self.run.finish(120)
            assert code == 75, f"exit status {code}:\n{self.run.output_tail()}"
        finally:
            if self.run.ended() is None:
                self.run.kill_tree()
        return self.numbers()

    def sleep(self, seconds: float) -> None:
        end = time.time() + seconds
        while (left := end - time.time()) > 0:
            time.sleep(min(left, 1.0))
            assert self.run.ended() is None, f"it ended:\n{self.run.output_tail()}"

    def pids(self) -> list[int]:
        """Of the ranks of the newest launch that still run."""
        launches = ledger.launches(self.run.watched)
        started = [line["pid"] for line in launches[-1].lines if "pid" in line] if launches else []
        return [pid for pid in started if psutil.pid_exists(pid)]

    def strike(self, draw: random.Random) -> None:
        kind = self.options.faults[len(self.faults) % len(self.options.faults)]
        if kind == "partition":
            assert self.hosts is not None
            self.faults.append(Fault(kind, time.time()))
            self.hosts.network("down")
            self.sleep(PARTITION_SECONDS)
            self.hosts.network("up")
            return
        number = signal.SIGKILL if kind == "kill" else signal.SIGSTOP
        while not (pids := self.pids()):
            self.sleep(0.1)
        victim = draw.choice(pids)
        self.faults.append(Fault(kind, time.time()))
        os.kill(victim, number)

    def numbers(self) -> Numbers:
        launches = ledger.launches(self.run.watched)
        committed = ledger.committed(launches)
        times = [line["time"] for each in launches for line in each.lines if line["kind"] == "step"]
        samples = sum(sum(drawn.values()) for drawn in committed.values())
        seen: Counter[ledger.Visit] = Counter()
        for drawn in committed.values():
            seen += drawn
        last = max(epoch for epoch, _ in seen)
        finished = sum(epoch < last for epoch, _ in seen)
        drawn = sum(len(each.steps()) for each in launches)
        self.faults = [replace(fault, recovery=recovery(launches, fault)) for fault in self.faults]
        for fault in self.faults:
            print(f"{fault.kind}: {fault.recovery:.1f} s to the next step", flush=True)
        return {
            "throughput": samples / (max(times) - min(times)),
            "faults": len(self.faults),
            "samples lost": last * TRAINING - finished,
            "repeated": sum(seen.values()) - len(seen),
            "steps redone": drawn - len(committed),
        }


def recovery(launches: list[ledger.Launch], fault: Fault) -> float:
    """Seconds from a fault to the next step."""
    after = ledger.next_step(launches, fault.time)
    assert after is not None, f"no step after a {fault.kind}"
    return after - fault.time


def recoveries(title: str, faults: list[Fault]) -> Comparison:
    """By kind of fault."""
    table = Comparison(f"{title}: from a fault to the next step", RECOVERY, "all")
    for kind in dict.fromkeys(["all", *(fault.kind for fault in faults)]):
        seconds = sorted(fault.recovery for fault in faults if kind in ("all", fault.kind))
        if seconds:
            late = seconds[round(0.95 * (len(seconds) - 1))]
            numbers = len(seconds), statistics.median(seconds), late, seconds[-1]
            table.add(kind, dict(zip(RECOVERY, numbers, strict=True)))
    return table


def main() -> None:
    parser = results.options(__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="of each run with faults")
    parser.add_argument(
        "--every", type=float, nargs="+", default=[120.0, 30.0], help="seconds between faults"
    )
    parser.add_argument("--faults", type=lambda text: text.split(","), default=["kill", "stop"])
    parser.add_argument("--save", type=float, default=1.0, help="checkpoint.every_seconds")
    parser.add_argument(
        "--heartbeat", type=float, help="launch.heartbeat_timeout (default 60, 3 with partitions)"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.quick:
        options.minutes, options.every = 1.0, [15.0]
    partitions = "partition" in options.faults
    options.heartbeat = options.heartbeat or (3.0 if partitions else 60.0)
    title = f"{options.minutes:g} minutes of {', '.join(options.faults)}"
    names = {f"a fault in {every:g} s": every for every in options.every}
    table = Comparison(title, MEASURES, "undisturbed", tuple(names))
    tables = [table]
    with tempfile.TemporaryDirectory() as root:
        hosts = TwoHosts(Path(root)) if partitions else None

        def run(name: str, minutes: float, every: float | None = None) -> list[Fault]:
            folder = Path(tempfile.mkdtemp(dir=root))
            one = Run(folder / "run", options, hosts)
            numbers = one(minutes, every)
            table.add(name, numbers)
            print(f"{name}: {numbers['throughput']:.0f} samples/s", flush=True)
            return one.faults

        try:
            if hosts:
                hosts.start()
            run("undisturbed", options.minutes / 6)
            for name, every in names.items():
                tables.append(recoveries(name, run(name, options.minutes, every)))
                run("undisturbed", options.minutes / 6)
        finally:
            if hosts:
                hosts.stop()
    alone = statistics.median(map(float, table.samples["undisturbed"]["throughput"]))
    for name in names:
        table.add(name, {"kept": 100 * float(table.samples[name]["throughput"][0]) / alone})
    table.note = (
        f"Checkpoints every {options.save:g} s; a rank without a heartbeat for "
        f"{options.heartbeat:g} s has failed"
        + ("." if hosts else ", or one that is stopped for 2 s.")
    )
    results.write("goodput-partitions" if partitions else "goodput", tables, options)


if __name__ == "__main__":
    main()
