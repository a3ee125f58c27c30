"""The pages of `hpc-absa serve`: made again only when the files of a run have changed."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from hpc_absa import status
from hpc_absa.report import format as fmt
from hpc_absa.report.compare import find_runs, run_dirs
from hpc_absa.report.curves import chosen
from hpc_absa.report.history import History, load
from hpc_absa.report.page import LIBRARIES, Live, document, page
from hpc_absa.report.scalars import rows
from hpc_absa.report.timing import finite
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.lock import read_lock

if TYPE_CHECKING:
    from jinja2 import Environment

SCRIPTS = tuple(f"/static/{name}" for name in (*LIBRARIES, "live.js", "page.js"))
SHORTEST = 2.0
"""Seconds between two looks at a run."""
WORK_SHARE = 0.007
"""Part of a core that making pages may take: a page that takes longer is made less often."""
CHAIN_SECONDS = 30.0
"""Slurm is asked for the state of a chain at most this often."""
SEARCH_SECONDS = 5.0
"""Folders are searched for new runs at most this often."""
LOG_BYTES = 200_000
"""The end of a log that is shown."""
COMPARED = 50
"""Runs on the page that compares all."""
SPARK_POINTS, SPARK_WIDTH, SPARK_HEIGHT = 60, 120, 24


@dataclass
class Watched:
    """A run, and what was last read of it."""

    run: RunDir
    version: str = ""
    history: History | None = None
    status: status.Status | None = None

    def look(self) -> str:
        """The version of its files; history and status are read again if it is new."""
        version = _version(self.run)
        if version != self.version or self.history is None:
            self.history = load(self.run.path, self.run)
            self.status = status.status(self.run.path, history=self.history)
            self.version = version
        return version


def _version(run: RunDir) -> str:
    """Changes with the events, and with whether the run's process is alive."""
    lock = read_lock(run.lock)
    parts: list[object] = [lock and (lock.pid, lock.host, lock.live), run.stop_request.exists()]
    for path in (run.events, run.job):
        try:
            stat = path.stat()
            parts.append((stat.st_size, stat.st_mtime_ns))
        except OSError:
            parts.append(None)
    if run.chain.is_dir():
        parts.append(int(time.time() / CHAIN_SECONDS))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class Site:
    """The runs at some paths; folders are searched for new runs each time."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """
        Raises:
            UsageError: a path is neither a run directory nor a folder with some.
        """
        run_dirs(paths)
        self._paths = paths
        self._watched: dict[Path, Watched] = {}
        self._runs: dict[str, Watched] = {}
        self._searched = -math.inf
        self.seconds = SHORTEST
        """Until a page should ask again."""
        self._last_seconds = 0.0

    def runs(self) -> dict[str, Watched]:
        """By identifier, which is part of addresses: nothing else is ever looked up."""
        if time.monotonic() - self._searched < SEARCH_SECONDS:
            return self._runs
        found: dict[str, Watched] = {}
        for path in self._present():
            name = base = path.resolve().name or "run"
            number = 1
            while name in found:
                number += 1
                name = f"{base}~{number}"
            found[name] = self._watched.setdefault(path, Watched(RunDir(path)))
        self._runs, self._searched = found, time.monotonic()
        return found

    def _present(self) -> Iterator[Path]:
        for path in self._paths:
            yield from find_runs(path)

    def run(self, name: str) -> Watched | None:
        return self.runs().get(name)

    def version(self, watched: Sequence[Watched]) -> str:
        return hashlib.sha256("".join(some.look() for some in watched).encode()).hexdigest()[:16]

    def run_page(self, name: str, watched: Watched) -> str:
        logs = tuple(
            (log, f"/run/{quote(name, safe='')}/log/{quote(log, safe='')}")
            for log in log_names(watched.run)
        )
        index = "/" if len(self.runs()) > 1 else ""
        return self._page([watched], index, logs)

    def compared(self) -> list[Watched]:
        return list(self.runs().values())[:COMPARED]

    def comparison(self, watched: Sequence[Watched]) -> str:
        return self._page(watched, "/", ())

    def _page(
        self, watched: Sequence[Watched], index: str, logs: tuple[tuple[str, str], ...]
    ) -> str:
        version = self.version(watched)
        histories = [some.history for some in watched if some.history]
        states = [some.status.state for some in watched if some.status]
        live = Live(self.seconds, version, SCRIPTS, index, logs)
        return page(histories, states, live)

    def index(self) -> str:
        """The list of runs."""
        runs = self.runs()
        version = self.version(list(runs.values()))
        body = (
            _templates()
            .get_template("runs.html.j2")
            .render(
                runs=[(f"/run/{quote(name, safe='')}", name, some) for name, some in runs.items()],
                sparkline=sparkline,
            )
        )
        live = Live(self.seconds, version, ("/static/live.js",))
        return document("Runs", body, live)

    def log(self, name: str, watched: Watched, log: str) -> str | None:
        """A page with the end of a log; None where there is none of this name."""
        if log not in log_names(watched.run):
            return None
        path = watched.run.logs / log
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - LOG_BYTES))
            text = file.read(LOG_BYTES).decode("utf-8", "replace")
        body = (
            _templates()
            .get_template("log.html.j2")
            .render(
                name=name,
                address=f"/run/{quote(name, safe='')}",
                log=log,
                text=text,
                left_out=max(0, size - LOG_BYTES),
                lines=text.splitlines(),
            )
        )
        live = Live(self.seconds, f"{size}", ("/static/live.js",))
        return document(f"{log} of {name}", body, live)

    def took(self, seconds: float) -> None:
        """Note the work for a page; a single one that took long, as the first, does not count."""
        usual, self._last_seconds = min(seconds, self._last_seconds), seconds
        self.seconds = max(SHORTEST, round(usual / WORK_SHARE, 1))


def log_names(run: RunDir) -> list[str]:
    """The logs of a run: regular files in its folder, no links to elsewhere."""
    try:
        entries = [entry for entry in os.scandir(run.logs) if entry.name.endswith(".log")]
    except OSError:
        return []
    return sorted(entry.name for entry in entries if entry.is_file(follow_symlinks=False))


def sparkline(history: History) -> str:
    """The points of an SVG polyline: the training loss, on a logarithmic scale."""
    table = rows(history)
    table = [table[i] for i in chosen(table, "train_loss") if finite(table[i]["train_loss"]) > 0]
    step = max(1, math.ceil(len(table) / SPARK_POINTS))
    points = [
        (finite(r["epoch"]), math.log(finite(r["train_loss"])))
        for r in (*table[::step], *table[-1:])
    ]
    if len(points) < 2:
        return ""
    (low_x, high_x), (low_y, high_y) = (
        (min(values), max(values)) for values in zip(*points, strict=True)
    )
    width, height = (high_x - low_x) or 1.0, (high_y - low_y) or 1.0
    return " ".join(
        f"{SPARK_WIDTH * (x - low_x) / width:.1f},"
        f"{1 + (SPARK_HEIGHT - 2) * (high_y - y) / height:.1f}"
        for x, y in points
    )


@functools.cache
def _templates() -> Environment:
    from jinja2 import PackageLoader

    return fmt.templates().overlay(loader=PackageLoader("hpc_absa.serve", "."))
