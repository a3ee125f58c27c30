"""One self-contained HTML page about one run or several; it loads nothing from elsewhere."""

from __future__ import annotations

import base64
import contextlib
import functools
import gzip
import importlib.util
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hpc_absa import __version__
from hpc_absa.errors import HpcAbsaError, UsageError
from hpc_absa.report import curves, figures
from hpc_absa.report import format as fmt
from hpc_absa.report.compare import comparison, folded, run_dirs
from hpc_absa.report.history import History, labels, load
from hpc_absa.report.tables import run_result, time_table
from hpc_absa.report.timing import CATEGORIES, KINDS
from hpc_absa.rundir.files import require_replaceable, write_atomic

if TYPE_CHECKING:
    from jinja2 import Template

VERSIONS = ("torch", "horovod", "mpi4py", "h5py", "numpy")
"""Packages whose versions the page lists, from their metadata: none of them is imported."""

LIBRARIES = ("bokeh.min.js", "bokeh-api.min.js")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; "
"""Content security policy: the page can ask nothing of any other address."""
OWN_POLICY = POLICY + "script-src 'unsafe-inline'"
LIVE_POLICY = POLICY + "script-src 'self'; connect-src 'self'"


class ReportPaths(NamedTuple):
    html: Path
    png: Path


@dataclass(frozen=True)
class Live:
    """What a page of `hpc-absa serve` has besides."""

    seconds: float
    """Until it asks for changes."""
    version: str
    """Changes with what the page shows."""
    scripts: tuple[str, ...]
    """Addresses of the libraries and of `page.js`."""
    index: str = ""
    """Address of the list of runs."""
    logs: tuple[tuple[str, str], ...] = ()
    """Names and addresses."""


def write_report(
    paths: Sequence[Path], out: Path | None = None, states: Mapping[Path, str] | None = None
) -> ReportPaths:
    """Write the page and, next to it under the same name, an image of its figures.

    Args:
        paths: run directories, or folders of them such as that of a sweep.
        out: an `.html` file, or a folder for `report.html`; by default the given directory itself,
            with several the current folder.
        states: of run directories, as `hpc-absa status` has them.

    Raises:
        UsageError: no run directory given, a path is not a run directory, or the page or the image
            would replace a file that is not ours.
    """
    if not paths:
        raise UsageError("report: no run directory given; expected at least one")
    histories = [load(path) for path in run_dirs(paths)]
    if out is None:
        out = Path() if len(paths) > 1 else paths[0]
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        out /= "report.html"
    written = ReportPaths(out, out.with_suffix(".png"))
    written.html.parent.mkdir(parents=True, exist_ok=True)
    # The image beside a page of ours is ours; those of earlier versions have no mark.
    require_replaceable(written.html if written.html.exists() else written.png)
    write_atomic(written.png, figures.png(histories))
    known = {history.path: (states or {}).get(history.path, "") for history in histories}
    write_atomic(written.html, page(histories, [known[history.path] for history in histories]))
    return written


def page(histories: Sequence[History], states: Sequence[str] = (), live: Live | None = None) -> str:
    """The page; `states` are those of the runs, where they are known."""
    names = labels(histories)
    runs = list(zip(names, histories, strict=True))
    known = dict(zip(names, states, strict=False))
    results = [replace(run_result(history, 0, 0), schedule=name) for name, history in runs]
    times = time_table(results, baseline=names[0], label=lambda result: result.schedule)
    several = len(histories) > 1
    drawn = curves.curves(dict(runs), known)
    context = {"live": live} if live else {}
    return _render(
        title=f"{len(histories)} runs" if several else names[0],
        headline="Speed-ups are against the first." if several else headline(histories[0]),
        runs=runs,
        states={name: state for name, state in known.items() if state},
        missing=[] if several else histories[0].missing,
        comparison=comparison(runs, known).to_html() if several else "",
        times=times.to_html(),
        categories=CATEGORIES,
        installed=_installed(),
        curves=drawn,
        curves_json=curves.to_json(drawn),
        scripts=live.scripts if live else (),
        inline=() if live else _libraries(),
        policy=LIVE_POLICY if live else OWN_POLICY,
        **context,
    )


def library(name: str) -> Path:
    """A JavaScript file of the installed bokeh package, which is not imported.

    Raises:
        HpcAbsaError: bokeh is not installed.
    """
    spec = importlib.util.find_spec("bokeh")
    if spec is None or not spec.submodule_search_locations:
        raise HpcAbsaError("report: bokeh is not installed: pip install 'bokeh>=3.7,<4'")
    return Path(spec.submodule_search_locations[0]) / "server" / "static" / "js" / name


@functools.cache
def _libraries() -> tuple[str, ...]:
    """The libraries, compressed: 1.4 MB become 0.5 MB in each page."""
    files = (library(name).read_bytes() for name in LIBRARIES)
    return tuple(base64.b64encode(gzip.compress(file, mtime=0)).decode() for file in files)


def _phase_bars(history: History) -> list[tuple[str, Mapping[str, float]]]:
    return [
        (
            f"phase {p.number}: {fmt.plural(p.ranks, 'rank')}, batch {fmt.count(p.global_batch)}",
            p.seconds,
        )
        for p in history.phases
    ]


def _run_bars(runs: Sequence[tuple[str, History]]) -> list[tuple[str, Mapping[str, float]]]:
    return [(name, history.seconds) for name, history in runs]


def _total(seconds: Mapping[str, float]) -> float:
    return sum(seconds.values())


def _add_up(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    order = KINDS if all(key in KINDS for part in parts for key in part) else CATEGORIES
    sums = {key: sum(part.get(key, 0.0) for part in parts) for key in order}
    return {key: value for key, value in sums.items() if value > 0}


def _by_number(phases: Sequence[Any], number: str, values: str) -> dict[int, Any]:
    return {getattr(phase, number): getattr(phase, values) for phase in phases}


FILTERS = {
    "by_number": _by_number,
    "folded": folded,
    "phase_bars": _phase_bars,
    "run_bars": _run_bars,
    "total": _total,
    "add_up": _add_up,
}


def document(title: str, body: str, live: Live | None = None) -> str:
    """A page with other content, which is HTML."""
    if live is None:
        return _render(title=title, body=body, policy=OWN_POLICY)
    return _render(title=title, body=body, policy=LIVE_POLICY, live=live, scripts=live.scripts)


def _render(**context: Any) -> str:
    style = figures.CATEGORY_STYLE
    now = time.time()
    return _template().render(version=__version__, now=now, category_style=style, **context)


@functools.cache
def _template() -> Template:
    environment = fmt.templates().overlay()
    environment.filters = environment.filters | FILTERS
    return environment.get_template("page.html.j2")


def headline(history: History) -> str:
    """The result in a sentence; for an unfinished run, how far it is."""
    method = f"{history.method.upper()}: " if history.method else ""
    if not history.phases:
        return f"{method}not started"
    unfinished = history.done is None
    wanted = fmt.epoch(history.epochs_wanted)
    of = f" of {wanted}" if unfinished and wanted != fmt.MISSING else ""
    result = f"after {fmt.epoch(history.epochs_visited)}{of} epochs"
    name, measured = history.measured
    if measured != fmt.MISSING:
        result = f"{measured} {name} {result}"
    first, last = history.phases[0], history.phases[-1]
    return (
        f"{method}{'unfinished, ' if unfinished else ''}{result} and "
        f"{fmt.plural(history.steps, 'step')} in {fmt.duration(history.wall)}; "
        f"ranks {fmt.change(first.ranks, last.ranks)}, "
        f"global batch {fmt.change(first.global_batch, last.global_batch)}"
    )


@functools.cache
def _installed() -> str:
    versions = [f"Python {platform.python_version()}"]
    for name in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    return ", ".join(versions)
