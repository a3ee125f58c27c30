"""One self-contained HTML page about one run or several: no script, nothing external."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from hpc_absa import __version__
from hpc_absa.errors import UsageError
from hpc_absa.report import figures
from hpc_absa.report import format as fmt
from hpc_absa.report.figures import DARK, LIGHT
from hpc_absa.report.history import History, labels, load
from hpc_absa.report.tables import Table, run_result, time_table
from hpc_absa.report.timing import CATEGORIES
from hpc_absa.rundir.files import write_atomic

VERSIONS = ("torch", "horovod", "mpi4py", "h5py", "numpy")
"""Packages whose versions the page lists, from their metadata: none of them is imported."""


class ReportPaths(NamedTuple):
    html: Path
    png: Path


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> ReportPaths:
    """Write the page and, next to it under the same name, an image of its figures.

    Args:
        run_dirs: one run directory, or several to compare.
        out: an `.html` file, or a folder for `report.html`; by default the run directory itself,
            with several runs the current folder.

    Raises:
        UsageError: no run directory given, or a path is not a run directory.
    """
    if not run_dirs:
        raise UsageError("report: no run directory given; expected at least one")
    histories = [load(path) for path in run_dirs]
    if out is None:
        out = Path() if len(histories) > 1 else run_dirs[0]
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        out /= "report.html"
    paths = ReportPaths(out, out.with_suffix(".png"))
    paths.html.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(paths.png, figures.png(histories))
    write_atomic(paths.html, page(histories))
    return paths


def page(histories: Sequence[History]) -> str:
    names = labels(histories)
    runs = list(zip(names, histories, strict=True))
    results = [replace(run_result(history, 0, 0), schedule=name) for name, history in runs]
    times = time_table(results, baseline=names[0], label=lambda result: result.schedule)
    panels = "Learning rate, global batch, ranks, top Hessian eigenvalue and test accuracy"
    texts = {"training": f"{panels} over epochs", "seconds": "Where each second went"}
    several = len(histories) > 1
    return _render(
        title=f"{len(histories)} runs" if several else names[0],
        headline="Speed-ups are against the first." if several else headline(histories[0]),
        runs=runs,
        missing=[
            f"{name}: {sentence}" if several else sentence
            for name, history in runs
            for sentence in history.missing
        ],
        images=[
            (texts[part], *(figures.svg_uri(histories, theme, part) for theme in (LIGHT, DARK)))
            for part in figures.PARTS
        ],
        times=times.to_html(),
        categories=CATEGORIES,
        installed=_installed(),
    )


def document(table: Table) -> str:
    return _render(title=table.title, body=table.to_html())


def _render(**context: Any) -> str:
    template = fmt.templates().get_template("page.html.j2")
    themes = {"light": LIGHT, "dark": DARK}
    return template.render(**themes, version=__version__, now=time.time(), **context)


def headline(history: History) -> str:
    """The result in a sentence; for an unfinished run, how far it is."""
    method = f"{history.method.upper()}: " if history.method else ""
    if not history.phases:
        return f"{method}not started"
    unfinished = history.done is None
    wanted = fmt.epoch(history.epochs_wanted)
    of = f" of {wanted}" if unfinished and wanted != fmt.MISSING else ""
    result = f"after {fmt.epoch(history.epochs_visited)}{of} epochs"
    accuracy = fmt.percent(history.test_accuracy)
    if accuracy != fmt.MISSING:
        result = f"{accuracy} test accuracy {result}"
    first, last = history.phases[0], history.phases[-1]
    return (
        f"{method}{'unfinished, ' if unfinished else ''}{result} and "
        f"{fmt.plural(history.steps, 'step')} in {fmt.duration(history.wall)}; "
        f"ranks {fmt.change(first.ranks, last.ranks)}, "
        f"global batch {fmt.change(first.global_batch, last.global_batch)}"
    )


def _installed() -> str:
    versions = [f"Python {platform.python_version()}"]
    for name in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    return ", ".join(versions)
