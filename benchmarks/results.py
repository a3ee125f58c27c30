"""Runs contenders in turns and writes `benchmarks/results/<name>.md` and `.json`.

options = results.options(__doc__).parse_args()
table = results.Comparison("ResNet-8, 2 ranks", {"speed": Measure("samples/s", "higher")}, "ours")
table.run({"ours": ours, "DDP": Command(["torchrun", ...])}, options.rounds)
results.write("training", [table], options)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
BEGIN = time.time()
Value = float | str
Numbers = Mapping[str, Value]


@dataclass(frozen=True)
class Measure:
    unit: str
    better: Literal["lower", "higher", ""] = ""
    """"": no ratio is reported."""


@dataclass(frozen=True)
class Command:
    """A contender in a process of its own; the last line that it prints is a JSON object."""

    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 600.0

    def __call__(self) -> Numbers:
        environment = {**os.environ, **self.environment}
        options = {"cwd": ROOT, "env": environment, "timeout": self.timeout}
        done = subprocess.run(self.words, capture_output=True, text=True, **options)  # type: ignore[call-overload]
        if done.returncode:
            last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
            raise RuntimeError(f"exit status {done.returncode}: {''.join(last).strip()[:200]}")
        numbers: Numbers = json.loads(done.stdout.strip().splitlines()[-1])
        return numbers


@dataclass
class Comparison:
    """One table: a row per contender, a column per measure."""

    title: str
    measures: dict[str, Measure]
    baseline: str
    """Ratios are to this contender; usually ours, which is then compared with the best other."""
    not_peers: tuple[str, ...] = ()
    """Limits, and settings of our own: never the best other."""
    note: str = ""
    samples: dict[str, dict[str, list[Value]]] = field(default_factory=dict)
    """By contender and measure, one value per round."""
    problems: dict[str, str] = field(default_factory=dict)
    """By contender: why it has no numbers, or not of all rounds."""

    def run(
        self, contenders: Mapping[str, Callable[[], Numbers]], rounds: int = 5, warmups: int = 1
    ) -> None:
        """Let every contender run once a round, in an order that rotates; one that fails is out."""
        names = list(contenders)
        for number in range(-warmups, rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                if name in self.problems:
                    continue
                try:
                    numbers = contenders[name]()
                except Exception as error:
                    self.problems[name] = f"{type(error).__name__}: {error}"
                    continue
                text = ", ".join(f"{key} {shown(value)}" for key, value in numbers.items())
                print(f"{self.title}, round {number}: {name}: {text}", file=sys.stderr, flush=True)
                if number >= 0:
                    self.add(name, numbers)

    def add(self, contender: str, numbers: Numbers) -> None:
        of_one = self.samples.setdefault(contender, {})
        for measure, value in numbers.items():
            of_one.setdefault(measure, []).append(value)

    def ratio(self, one: str, other: str, measure: str) -> float | None:
        """Median over the rounds of the quotient."""
        values = [self.samples.get(name, {}).get(measure, []) for name in (one, other)]
        pairs = zip(*values, strict=False)
        known = [a / b for a, b in pairs if not isinstance(a, str) and not isinstance(b, str) and b]
        return statistics.median(known) if known else None

    def best_other(self, measure: str) -> tuple[str, float] | None:
        """The best contender but the baseline, and by how much the baseline is better (> 1)."""
        sign = {"lower": 1, "higher": -1, "": 0}[self.measures[measure].better]
        others = {
            name: middle
            for name, of_one in self.samples.items()
            if name not in (self.baseline, *self.not_peers)
            and not isinstance(middle := median(of_one.get(measure)), str)
        }
        if not sign or not others or self.baseline not in self.samples:
            return None
        name = min(others, key=lambda one: sign * others[one])
        ratio = self.ratio(name, self.baseline, measure)
        return (name, ratio if sign > 0 else 1 / ratio) if ratio else None

    def summary(self) -> dict[str, dict[str, Any]]:
        return {
            name: {
                measure: {"median": median(values), "range": [min(values), max(values)]}
                | {"ratio": self.ratio(name, self.baseline, measure)}
                for measure, values in of_one.items()
                if not isinstance(values[0], str)
            }
            for name, of_one in self.samples.items()
        }

    def markdown(self) -> list[str]:
        heads, names = [], [*self.samples, *(n for n in self.problems if n not in self.samples)]
        for key, measure in self.measures.items():
            heads.append(f"{key}, {measure.unit}" if measure.unit else key)
            heads += [f"× {self.baseline}"] if measure.better else []
        lines = [f"## {self.title}", "", f"| | {' | '.join(heads)} |"]
        lines.append("| --- |" + " ---: |" * len(heads))
        for name in names:
            cells = []
            for key, measure in self.measures.items():
                values = self.samples.get(name, {}).get(key, [])
                cells.append(cell(values))
                ratio = self.ratio(name, self.baseline, key)
                cells += [f"{ratio:.2f}" if ratio else ""] if measure.better else []
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
        for key in self.measures:
            if best := self.best_other(key):
                lines.append(f"- {key}: {self.baseline} is {best[1]:.2f} × as good as {best[0]}")
        lines += [f"- {name}: no result: {why}" for name, why in self.problems.items()]
        lines += [""] if lines[-1] else []
        return [*lines, *([self.note, ""] if self.note else [])]


def median(values: Sequence[Value] | None) -> Value:
    numbers = [value for value in values or () if not isinstance(value, str)]
    return statistics.median(numbers) if numbers else ", ".join(sorted(set(map(str, values or ()))))


def shown(value: Value) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cell(values: Sequence[Value]) -> str:
    """Median and range."""
    numbers = [value for value in values if not isinstance(value, str)]
    if len(set(numbers)) < 2:
        return shown(median(values))
    return f"{shown(median(values))} ({shown(min(numbers))} to {shown(max(numbers))})"


def line_of(*words: str) -> str:
    """First line that a program prints; empty where there is none."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=30)
    except OSError:
        return ""
    return "" if done.returncode else done.stdout.partition("\n")[0].strip()


def machine(packages: Sequence[str] = ()) -> dict[str, str]:
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = {}
    for name in ("torch", "horovod", "mpi4py", *packages):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / 2**30:.0f} GiB",
        "GPU": line_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "none",
        "system": f"{platform.freedesktop_os_release()['PRETTY_NAME']}, Linux {platform.release()}",
        "Python": platform.python_version(),
        "MPI": line_of(str(Path(sys.executable).with_name("mpirun")), "--version")
        or line_of("mpirun", "--version"),
        **versions,
    }


def options(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every benchmark has."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a reduced version, about a minute")
    parser.add_argument("--rounds", type=int, default=5, help="after one that is not counted")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    return parser


def write(
    name: str,
    comparisons: Sequence[Comparison],
    options: argparse.Namespace,
    packages: Sequence[str] = (),
) -> None:
    """Write and print the tables; those of `--quick` go into a folder that Git ignores."""
    folder = options.out / "quick" if options.quick else options.out
    folder.mkdir(parents=True, exist_ok=True)
    changed = line_of("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    words = (Path(word).name if word.startswith("/") else word for word in sys.orig_argv[1:])
    about = {
        "command": shlex.join(["python", *words]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": f"{time.time() - BEGIN:.0f}",
        "commit": line_of("git", "rev-parse", "HEAD") + (" with changes" if changed else ""),
        "load before": str(LOAD),
        **machine(packages),
    }
    lines = [f"# {name}", "", f"`{about['command']}`", ""]
    for comparison in comparisons:
        lines += comparison.markdown()
    lines += ["## Made on", "", *(f"- {key}: {value}" for key, value in about.items())]
    content = {
        "name": name,
        "about": about,
        "comparisons": [
            {**asdict(c), "summary": c.summary(), "best": {m: c.best_other(m) for m in c.measures}}
            for c in comparisons
        ],
    }
    text = "\n".join(lines) + "\n"
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    (folder / f"{name}.md").write_text(text)
    (folder / "README.md").write_text(index(folder))
    print(text)


def index(folder: Path) -> str:
    """The page of all results: of each measure, the baseline's median and the best other.

    Where no measure says which is better, all rows.
    """
    lines = ["# Results", "", "Written by `make bench`; each page names its command and machine."]
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        about = result["about"]
        lines += ["", f"## [{path.stem}]({path.stem}.md)", ""]
        machine = [about["processor"], f"{about['cores']} cores", about["date"][:10]]
        machine += [about["GPU"]] if about.get("GPU", "none") != "none" else []
        if float(about.get("load before", 0)) > BUSY:
            machine.append(f"made on a busy machine (load {about['load before']}): to be repeated")
        lines += [", ".join(machine), ""]
        for one in result["comparisons"]:
            compared = {key for key, measure in one["measures"].items() if measure["better"]}
            for name in [one["baseline"]] if compared else one["summary"]:
                own, found = one["summary"].get(name, {}), []
                for key, measure in one["measures"].items():
                    if key in own and key in (compared or own):
                        text = f"{key} {shown(own[key]['median'])} {measure['unit']}".rstrip()
                        best = one["best"][key]
                        text += f", {best[1]:.2f} × as good as {best[0]}" if best else ""
                        found.append(text)
                lines += [f"- {one['title']}: {name}: {'; '.join(found)}"] if found else []
    return "\n".join(lines) + "\n"


BUSY = 8.0
"""A load before a benchmark above which it did not have the machine to itself; the loads of the
benchmark before it, and of tests, are still in the average below that."""
LOAD = round(os.getloadavg()[0], 2)
"""Processes that were ready to run in the minute before: timings are not reliable above 0.5."""
