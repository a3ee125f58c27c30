"""Throughput that a run keeps while its ranks are killed, stopped and cut off from each other.

    python -m benchmarks.goodput [--minutes 30] [--every 120] [--faults kill,stop,partition]

ResNet-8 on images of the size of CIFAR-10's, on two ranks, in steps of 512 images. A rank drawn at
random is killed (SIGKILL) or stopped (SIGSTOP), at random moments, on average once in `--every`
seconds. `partition` puts each rank on a host in a network namespace (root; sshd) and cuts the link
between them for 15 s. Throughput is the samples of the steps that count, divided by the time from
the first to the last of them, beside an undisturbed run of the same length. Every rank records the
samples that it draws: `lost` and `repeated` count samples of finished epochs that the weights have
not seen, or saw twice. A recovery is the time from a fault to the next step; of a stop, with the
`--heartbeat` seconds after which it is noticed. Medians and the 95th percentile.
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
from dataclasses import dataclass
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
    "throughput": Measure("samples/s", "higher"),
    "kept": Measure("%"),
    "faults": Measure(""),
    "recovery": Measure("s"),
    "95 %": Measure("s"),
    "from kills": Measure("s"),
    "samples lost": Measure(""),
    "repeated": Measure(""),
    "steps redone": Measure(""),
}


@dataclass(frozen=True)
class Fault:
    kind: str
    time: float
    """Unix seconds."""


class Run:
    """One run of the job for a stated time, with faults or without."""

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

    def __call__(self, every: float | None) -> Numbers:
        """Train for the stated time, with a fault in `every` seconds on average."""
        self.run.start()
        try:
            self.run.wait_for(lambda: self.pids() and self.run.events("progress"), "a step")
            end = time.time() + 60 * self.options.minutes
            draw = random.Random(self.options.seed)
            while every and (at := time.time() + draw.expovariate(1 / every)) < end - APART:
                self.sleep(at - time.time())
                self.strike(draw)
                self.sleep(APART)
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
        kind = draw.choice(self.options.faults)
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
        recoveries = [(fault.kind, self.recovery(launches, fault)) for fault in self.faults]
        for kind, seconds in recoveries:
            print(f"{kind}: {seconds:.1f} s to the next step", flush=True)
        numbers: dict[str, float | str] = {
            "throughput": samples / (max(times) - min(times)),
            "faults": len(self.faults),
            "samples lost": last * TRAINING - finished,
            "repeated": sum(seen.values()) - len(seen),
            "steps redone": drawn - len(committed),
        }
        if recoveries:
            ordered = sorted(each for _, each in recoveries)
            numbers["recovery"] = statistics.median(ordered)
            numbers["95 %"] = ordered[round(0.95 * (len(ordered) - 1))]
        if kills := [each for kind, each in recoveries if kind == "kill"]:
            numbers["from kills"] = statistics.median(kills)
        return numbers

    @staticmethod
    def recovery(launches: list[ledger.Launch], fault: Fault) -> float:
        """Seconds from a fault to the next step."""
        after = ledger.next_step(launches, fault.time)
        assert after is not None, f"no step after a {fault.kind}"
        return after - fault.time


def main() -> None:
    parser = results.options(__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="of each of the two runs")
    parser.add_argument("--every", type=float, default=120.0, help="seconds between faults")
    parser.add_argument("--faults", type=lambda text: text.split(","), default=["kill", "stop"])
    parser.add_argument("--save", type=float, default=2.0, help="checkpoint.every_seconds")
    parser.add_argument("--heartbeat", type=float, default=3.0, help="launch.heartbeat_timeout")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.quick:
        options.minutes, options.every = 1.0, 20.0
    with tempfile.TemporaryDirectory() as root:
        hosts = TwoHosts(Path(root)) if "partition" in options.faults else None
        try:
            if hosts:
                hosts.start()
            alone = dict(Run(Path(root) / "alone", options, hosts)(None))
            disturbed = dict(Run(Path(root) / "disturbed", options, hosts)(options.every))
        finally:
            if hosts:
                hosts.stop()
    disturbed["kept"] = 100 * float(disturbed["throughput"]) / float(alone["throughput"])
    title = f"{options.minutes:g} minutes, a fault in {options.every:g} s: "
    table = Comparison(title + ", ".join(options.faults), MEASURES, "undisturbed", ("with faults",))
    table.note = (
        f"Checkpoints every {options.save:g} s; a rank without a heartbeat for "
        f"{options.heartbeat:g} s counts as failed."
    )
    table.add("undisturbed", alone)
    table.add("with faults", disturbed)
    name = "goodput" if hosts is None else "goodput-partitions"
    results.write(name, [table], options)


if __name__ == "__main__":
    main()
