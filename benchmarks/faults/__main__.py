"""The same faults in the same training under hpc_absa, Horovod Elastic, torchrun and Lightning.

    python -m benchmarks.faults [--only NAME ...] [--quick]

One small language model in 68 steps of at least 0.1 s, with the same data, initial weights, global
batch and optimizer for all; the order of the samples is each system's own. Rank 1 kills (SIGKILL)
or stops (SIGSTOP) itself after a step; the operator takes a rank away, or adds one. `lost` and
`repeated` count the samples that the final weights have not seen, or saw more than once in an
epoch; `redone` the steps that were taken again from an earlier state. The weights, of which the
page has the beginning of the SHA-256, are compared with those of the same system's undisturbed run
on two ranks.

Then the newest checkpoint of a run that was stopped at half of its steps is cut off, as by a crash,
or gets four flipped bytes, and the run is continued.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.faults import trace
from benchmarks.faults.plain import SAVE_EVERY, STEPS
from benchmarks.faults.systems import DETECTION, HERE, RENDEZVOUS, SYSTEMS, System
from benchmarks.results import Comparison, Measure, Numbers

CASES: dict[str, tuple[int, str]] = {
    "undisturbed, 2 ranks": (2, ""),
    "rank 1 of 2 is killed after step 25": (2, "25 kill"),
    "rank 1 of 2 is stopped after step 25": (2, "25 stop"),
    "from 2 ranks to 1 after step 25": (2, "25 ranks=1"),
    "from 1 rank to 2 after step 25": (1, "25 ranks=2"),
    "a kill, to 1 rank, to 2 ranks, a stop": (2, "15 kill,25 ranks=1,40 ranks=2,55 stop"),
}
QUICK = dict([*CASES.items()][:2])
PATIENCE = 60
"""Seconds, besides three times an undisturbed run, after which a run is taken to hang."""
SETTINGS = f"""\
Saved or committed every {SAVE_EVERY} steps, hpc_absa each {{seconds:g}} s. A rank has failed after
{DETECTION} s without an answer, where a system has such a setting; hpc_absa notices a stopped one
itself. hpc_absa: `launch.fork_server`. torchrun: `--max-restarts=3`; where agents come and go,
{RENDEZVOUS} and no shared store. Horovod: `--blacklist-cooldown-range 1 2`, so that the host of a
killed rank is used again."""
MEASURES = {
    "end": Measure(""),
    "samples lost": Measure(""),
    "repeated": Measure(""),
    "steps redone": Measure(""),
    "longest time between steps": Measure("s", "lower"),
    "wall time": Measure("s", "lower"),
    "weights": Measure(""),
}


class Benchmark:
    def __init__(self, root: Path, epochs: int, pace: float) -> None:
        self.root, self.epochs, self.pace = root, epochs, pace
        self.systems: list[System] = []
        self.patience: dict[str, float] = {}
        """By system, from its first run."""
        self.reference: dict[str, str] = {}
        """SHA-256 of the weights of the undisturbed run, by system."""

    def new(self, name: str, events: str = "") -> System:
        folder = self.root / f"{len(self.systems)}"
        self.systems.append(SYSTEMS[name](folder, self.epochs, self.pace, events))
        return self.systems[-1]

    def close(self) -> None:
        """Kill what still runs after an interruption."""
        for system in self.systems:
            if system.running():
                system.wait(0)

    def weights(self, system: System, reference: bool = False) -> str:
        if not (system.folder / "model.pt").exists():
            return "none"
        state = torch.load(system.folder / "model.pt")
        digest = hashlib.sha256()
        for name in sorted(state):
            digest.update(name.encode() + state[name].numpy().tobytes())
        found = digest.hexdigest()[:8]
        if reference:
            self.reference.setdefault(system.name, found)
        return f"{'same' if found == self.reference.get(system.name) else 'other'}, {found}"

    def replay(self, name: str, ranks: int, events: str) -> Numbers:
        """One run with its faults."""
        system, begin = self.new(name, events), time.time()
        patience = self.patience.get(name, 2 * PATIENCE)
        system.start(ranks)
        for at, what in (event.split() for event in filter(None, events.split(","))):
            if not what.startswith("ranks="):
                continue
            while system.running() and system.step() < int(at) and time.time() < begin + patience:
                time.sleep(0.05)
            if system.running():
                system.resize(int(what.removeprefix("ranks=")))
        end = system.wait(max(1.0, begin + patience - time.time()))
        self.patience.setdefault(name, PATIENCE + 3 * (time.time() - begin))
        found = trace.account(system.records(), self.epochs)
        return {
            "end": end,
            "samples lost": found.lost,
            "repeated": found.repeated,
            "steps redone": found.redone,
            # of a run that hangs, only the steps before that are known
            "longest time between steps": "none" if end.startswith("hangs") else found.gap,
            "wall time": time.time() - begin,
            "weights": self.weights(system, reference=not events),
        }

    def example(self, name: str, events: str) -> Numbers:
        """The model of examples/language_model.py; rank 1 is killed after 20 steps if `events`."""
        system = self.new(name, events)
        system.runs_example = True
        system.start(2)
        end = system.wait(2 * PATIENCE)
        return {
            "end": end,
            "test loss": system.test_loss(),
            "lines": code_lines(HERE.parents[1] / system.example),
        }

    def half(self, name: str) -> System:
        """A run that was stopped at half of its steps, as by a scheduler."""
        system = self.new(name)
        system.start(2)
        while system.running() and system.step() < self.epochs * STEPS // 2:
            time.sleep(0.05)
        system.interrupt()
        return system

    def damaged(self, name: str, half: System, damage: Callable[[Path], None]) -> Numbers:
        """A copy of it with a damaged checkpoint, continued."""
        system = self.new(name)
        shutil.copytree(half.folder, system.folder, dirs_exist_ok=True)
        damage(newest(system.folder))
        system.start(2)
        return {"end": system.wait(2 * PATIENCE), "weights": self.weights(system)}


def newest(folder: Path) -> Path:
    """The largest file of the newest checkpoint."""
    files = [*folder.glob("saved/*/*.distcp"), *folder.glob("run/checkpoints/step-*.h5")]
    if last := [*folder.glob("saved/last.ckpt")]:
        return last[0]
    newest = max(str(path.parent if path.suffix == ".distcp" else path) for path in files)
    return max((p for p in files if str(p).startswith(newest)), key=lambda p: p.stat().st_size)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (path.parent / ".metadata").unlink(missing_ok=True)  # DCP writes it last


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4] = (255 - byte for byte in content[middle : middle + 4])
    path.write_bytes(content)


def changed_lines(script: str) -> int:
    """Changed or added lines of a script against plain.py, without those for this benchmark."""

    def code(name: str) -> list[str]:
        lines = (HERE / f"{name}.py").read_text().split('"""', 2)[2].splitlines()
        kept = (line.strip() for line in lines)
        return [s for s in kept if s and "trac" not in s.lower() and "benchmarks." not in s]

    plain, own = code("plain"), code(script)
    return sum(line.startswith("+ ") for line in difflib.ndiff(plain, own))


def code_lines(path: Path) -> int:
    """Of the training alone: no model and data, imports, docstrings, comments and blank lines."""
    text = path.read_text()
    lines, shared = text.splitlines(), {"text", "collate", "LanguageModel", "loss_fn"}
    counted: set[int] = set()
    for part in ast.parse(text).body:
        if isinstance(part, (ast.FunctionDef, ast.ClassDef)) and part.name not in shared:
            counted |= set(range(part.lineno, part.end_lineno + 1))
            for node in ast.walk(part):
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                    counted -= set(range(node.lineno, node.end_lineno + 1))
    return sum(bool(line := lines[k - 1].strip()) and line[0] != "#" for k in counted)


def lines_of_code(names: list[str]) -> Comparison:
    table = Comparison("Changed or added lines", {"lines": Measure("")}, "hpc_absa")
    table.note = "Against plain.py, for one process; without those that record the trace."
    for name in names:
        table.add(name, {"lines": changed_lines(SYSTEMS[name].script)})
    return table


def replays(
    benchmark: Benchmark, names: list[str], rounds: int, words: list[str], quick: bool
) -> Iterator[Comparison]:
    for title, (ranks, events) in (QUICK if quick else CASES).items():
        if words and not any(w in title for w in ("undisturbed", *words)):
            continue
        table = Comparison(title[0].upper() + title[1:], MEASURES, "hpc_absa")
        contenders = {name: partial(benchmark.replay, name, ranks, events) for name in names}
        table.run(contenders, rounds, warmups=0)
        if not events:
            table.note = SETTINGS.format(seconds=SAVE_EVERY * benchmark.pace)
        yield table


def examples(benchmark: Benchmark, names: list[str]) -> Iterator[Comparison]:
    measures = {"end": Measure(""), "test loss": Measure(""), "lines": Measure("")}
    for title, events in {"undisturbed": "", "rank 1 of 2 is killed": "kill"}.items():
        table = Comparison(f"examples/language_model.py, {title}", measures, "hpc_absa")
        table.note = (
            "The batch of hpc_absa grows, as in the example: fewer steps in the same four epochs, "
            "which are too few for this model. That of the others is constant."
        )
        contenders = {n: partial(benchmark.example, n, events) for n in names if SYSTEMS[n].example}
        table.run(contenders, rounds=1, warmups=0)
        yield table


def damages(benchmark: Benchmark, names: list[str]) -> Iterator[Comparison]:
    halves = {name: benchmark.half(name) for name in names if SYSTEMS[name].writes_files}
    for title, damage in {"is cut off": cut_off, "has four flipped bytes": flip}.items():
        measures = {"end": Measure(""), "weights": Measure("")}
        table = Comparison(f"The newest checkpoint {title}", measures, "hpc_absa")
        contenders = {n: partial(benchmark.damaged, n, half, damage) for n, half in halves.items()}
        table.run(contenders, rounds=1, warmups=0)
        yield table


def main() -> None:
    parser = results.options(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--only", nargs="+", choices=[*SYSTEMS], default=[*SYSTEMS], metavar="NAME")
    parser.add_argument("--case", action="append", default=[], help="words of a case's title")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    names, rounds = options.only, 1 if options.quick else options.rounds
    tables = [lines_of_code(names)]
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as root:
        benchmark = Benchmark(Path(root), *((1, 0.05) if options.quick else (2, 0.1)))
        measured: Iterable[Comparison] = replays(
            benchmark, names, rounds, options.case, options.quick
        )
        if not options.quick and not options.case:
            measured = chain(measured, examples(benchmark, names), damages(benchmark, names))
        try:
            tables.extend(measured)
        finally:  # an interruption leaves the results of what was done
            benchmark.close()
            results.write("faults", tables, options, packages=("lightning", "torchdata"))


if __name__ == "__main__":
    main()
