"""One self-contained HTML page about one run or several: no script, nothing from elsewhere."""

from __future__ import annotations

import html
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from hpc_absa import __version__
from hpc_absa.errors import UsageError
from hpc_absa.report import figures, text
from hpc_absa.report.accounting import CATEGORIES
from hpc_absa.report.history import DecisionPoint, History, Interruption, Phase, labels, load
from hpc_absa.report.palette import DARK, LIGHT
from hpc_absa.report.rank_seconds import KINDS
from hpc_absa.report.style import style_sheet
from hpc_absa.report.tables import run_result, time_table
from hpc_absa.rundir import RunDir

VERSIONS = ("torch", "horovod", "mpi4py", "h5py", "numpy")
"""Packages whose versions the page tells, from their metadata: none of them is imported."""


@dataclass(frozen=True)
class ReportPaths:
    """What `write_report` wrote."""

    html: Path
    png: Path


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> ReportPaths:
    """Write the page and, next to it under the same name, the picture.

    Args:
        run_dirs: One run directory, or several to lay over each other.
        out: An `.html` file, or a folder for `report.html`; by default the run directory itself,
            with several runs the current folder.

    Raises:
        UsageError: no run directory given, or one of them is none.
    """
    if not run_dirs:
        raise UsageError("report: no run directory given; expected at least one")
    histories = [load(Path(path)) for path in run_dirs]
    paths = _paths(histories, out)
    paths.html.parent.mkdir(parents=True, exist_ok=True)
    _replace(paths.png, figures.png(figures.overview_figure(histories)))
    _replace(paths.html, page(histories).encode())
    return paths


def page(histories: Sequence[History]) -> str:
    """The page as text."""
    single = len(histories) == 1
    title = histories[0].name if single else f"{len(histories)} runs"
    return document(title, _one_run(histories[0]) if single else _several_runs(histories))


def document(title: str, body: Sequence[str]) -> str:
    """A whole page around `body`, pieces of HTML."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="generator" content="hpc-absa report">',
            f"<title>{_e(title)} · hpc-absa</title>",
            f"<style>\n{style_sheet()}</style></head>",
            "<body><main>",
            *body,
            f"<footer>Written by hpc-absa {_e(__version__)}, {_e(text.moment(time.time()))}."
            "</footer>",
            "</main></body></html>",
            "",
        ]
    )


def _one_run(history: History) -> list[str]:
    return [
        f"<h1>{_e(history.name)}</h1>",
        f'<p class="sub">{_e(headline(history))}</p>',
        _tiles(history),
        _notice(history.missing),
        "<h2>The course</h2>",
        _pictures([history]),
        *_decisions(history),
        *_seconds(history),
        *_costs(history),
        *_phases(history),
        *_failures(history.interruptions),
        *_environment(history),
        *_job(history),
    ]


def _several_runs(histories: Sequence[History]) -> list[str]:
    names = labels(histories)
    results = [run_result(history, 0, 0) for history in histories]
    name_of = {id(result): name for result, name in zip(results, names, strict=True)}
    times = time_table(results, baseline=names[0], label=lambda result: name_of[id(result)])
    missing = [
        f"{n}: {words}" for n, h in zip(names, histories, strict=True) for words in h.missing
    ]
    parts = [
        f"<h1>{len(histories)} runs</h1>",
        '<p class="sub">Laid over each other; speed-ups are against the first.</p>',
        _summary(histories, names),
        _notice(missing),
        "<h2>The courses</h2>",
        _pictures(histories),
        "<h2>Where the time went</h2>",
        times.to_html(),
    ]
    for history, name in zip(histories, names, strict=True):
        inner = [*_decisions(history), *_seconds(history), *_costs(history), *_phases(history)]
        inner += [*_failures(history.interruptions), *_environment(history), *_job(history)]
        parts += [f"<details><summary>{_e(name)}: decisions, phases, job</summary>", *inner]
        parts += ["</details>"]
    return parts


def headline(history: History) -> str:
    """The result in a sentence; for an unfinished run, how far it came."""
    method = f"{history.method.upper()}: " if history.method else ""
    if not history.phases:
        return f"{method}not started"
    wanted = history.epochs_wanted
    of = f" of {text.epoch(wanted)}" if text.known(wanted) and history.done is None else ""
    result = f"after {text.epoch(history.epochs_visited)}{of} epochs"
    if text.known(history.test_accuracy):
        result = f"{text.percent(history.test_accuracy)} test accuracy {result}"
    first, last = history.phases[0], history.phases[-1]
    ranks = _span(first.ranks, last.ranks)
    batch = _span(first.global_batch, last.global_batch)
    state = "" if history.done is not None else "unfinished, "
    return (
        f"{method}{state}{result} and {text.plural(history.steps, 'step')} in "
        f"{text.duration(history.wall)}; ranks {ranks}, global batch {batch}"
    )


def _tiles(history: History) -> str:
    grown = sum(decision.action == "grow" for decision in history.decisions)
    computing = history.seconds.get("comp", 0.0) / history.wall if history.wall > 0 else None
    last = history.phases[-1] if history.phases else None
    tiles = [
        (text.percent(history.test_accuracy), "test accuracy"),
        (text.epoch(history.epochs_visited), "epochs"),
        (text.count(history.steps), "optimizer steps"),
        (text.duration(history.wall), "wall time"),
        (text.percent(computing, 0), "of it computing"),
        (f"{grown}", "times grown"),
        (text.count(last.ranks if last else None), "ranks at last"),
        (text.count(last.global_batch if last else None), "global batch at last"),
    ]
    inner = "".join(f'<div class="tile"><b>{_e(a)}</b><span>{_e(b)}</span></div>' for a, b in tiles)
    return f'<div class="tiles">{inner}</div>'


def _notice(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    inner = "".join(f"<p>{_e(sentence)}</p>" for sentence in sentences)
    return f'<div class="notice" role="note">{inner}</div>'


def _pictures(histories: Sequence[History]) -> str:
    names = ", ".join(labels(histories))
    course = "Learning rate, global batch, ranks, top Hessian eigenvalue and test accuracy"
    return "\n".join(
        [
            _picture(figures.course_figure, histories, f"{course} over epochs: {names}"),
            _picture(figures.seconds_figure, histories, f"Where each second went: {names}"),
        ]
    )


def _picture(draw: figures.Draw, histories: Sequence[History], words: str) -> str:
    light, dark = (figures.svg_uri(draw(histories, theme)) for theme in (LIGHT, DARK))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{_e(words)}" src="{light}"></picture>'
    )


def _summary(histories: Sequence[History], names: Sequence[str]) -> str:
    rows = [
        [
            name,
            history.method.upper(),
            "done" if history.done is not None else "unfinished",
            text.percent(history.test_accuracy),
            text.epoch(history.epochs_visited),
            text.count(history.steps),
            _span(history.phases[0].ranks, history.phases[-1].ranks) if history.phases else "",
            text.duration(history.wall),
        ]
        for history, name in zip(histories, names, strict=True)
    ]
    heads = ["run", "schedule", "state", "accuracy", "epochs", "steps", "ranks", "wall time"]
    return _table(heads, rows, words=3)


def _decisions(history: History) -> list[str]:
    if not history.decisions:
        return ["<h2>Decisions</h2>", '<p class="note">None was made.</p>']
    heads = ["epoch", "λ", "residual", "matvecs", "took", "decision", "why"]
    rows = []
    for decision in history.decisions:
        kind = ' class="grow"' if decision.action == "grow" else ""
        cells = "".join(f'<td class="n">{_e(cell)}</td>' for cell in _decision_numbers(decision))
        words = f"<td>{_e(decision.action)}</td><td class='why'>{_e(decision.reason)}</td>"
        rows.append(f"<tr{kind}>{cells}{words}</tr>")
    top = "".join(f'<th scope="col"{_n(i < 5)}>{_e(head)}</th>' for i, head in enumerate(heads))
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return ["<h2>Decisions</h2>", f'<div class="scroll">{table}</div>']


def _decision_numbers(decision: DecisionPoint) -> list[str]:
    mark = ""
    if text.known(decision.eigenvalue) and not decision.converged:
        mark = " (at least)" if decision.stopped_above_threshold else " (not converged)"
    return [
        text.epoch(decision.epoch),
        text.number(decision.eigenvalue) + mark,
        text.number(decision.residual, 2),
        text.count(decision.matvecs),
        text.duration(decision.seconds),
    ]


def _seconds(history: History) -> list[str]:
    keys = [key for key in CATEGORIES if history.seconds.get(key, 0) > 0]
    if not keys:
        return []
    rows = [
        [f"{phase.number}", *(f"{phase.seconds.get(k, 0):.1f}" for k in keys), f"{phase.wall:.1f}"]
        for phase in history.phases
    ]
    share = [text.percent(history.seconds[key] / history.wall, 1) for key in keys]
    rows.append(["all", *(f"{history.seconds[k]:.1f}" for k in keys), f"{history.wall:.1f}"])
    rows.append(["share", *share, ""])
    note = "Seconds, means over ranks; each row adds up to its total."
    if history.paused >= 1:
        note += f" {text.duration(history.paused)} in which nobody worked are not in it."
    return [
        "<h2>Where the time went</h2>",
        _table(["phase", *(CATEGORIES[k] for k in keys), "total"], rows, words=1, sums=2),
        f'<p class="note">{_e(note)}</p>',
    ]


def _costs(history: History) -> list[str]:
    cost = history.cost
    if not cost.phases or cost.largest <= 0:
        return []
    kinds = [k for k in KINDS if any(phase.kinds[k] > 0 for phase in cost.phases)]
    rows = [
        [
            f"{p.phase}",
            f"{p.ranks}",
            *(f"{p.kinds[k]:.1f}" for k in kinds),
            f"{p.worked:.1f}",
            f"{p.idle:.1f}",
            f"{p.queued:.1f}",
        ]
        for p in cost.phases
    ]
    held = "not held, and not charged for" if cost.chained else "held all the same"
    note = (
        f"Rank-seconds. Idle: places of the largest world that a smaller one left empty, {held}. "
        f"The run was charged for {cost.charged:.0f}; its largest world throughout would have been "
        f"for {cost.largest:.0f} ({text.percent(cost.charged / cost.largest, 1)})."
    )
    heads = ["phase", "ranks", *kinds, "worked", "idle", "queued"]
    return [
        "<h2>What it cost</h2>",
        _table(heads, rows, words=1, sums=0),
        f'<p class="note">{_e(note)}</p>',
    ]


def _phases(history: History) -> list[str]:
    if not history.phases:
        return []
    heads = ["phase", "ended", "began from", "ranks", "global batch", "learning rate", "epochs"]
    heads += ["steps", "attempts", "seconds"]
    return [
        "<h2>Phases</h2>",
        _table(heads, [_phase_cells(phase) for phase in history.phases], words=3),
    ]


def _phase_cells(phase: Phase) -> list[str]:
    return [
        str(phase.number),
        phase.outcome.replace("_", " "),
        phase.resumed_from or ("in memory" if phase.step_begin > 0 else "the start"),
        text.count(phase.ranks),
        text.count(phase.global_batch),
        text.number(phase.lr),
        f"{text.epoch(phase.epoch_begin)} – {text.epoch(phase.epoch_end)}",
        text.count(phase.step_end - phase.step_begin),
        str(phase.attempts),
        f"{phase.wall:.1f}",
    ]


def _failures(interruptions: Sequence[Interruption]) -> list[str]:
    if not interruptions:
        return []
    rows = [
        [
            text.moment(failure.time),
            failure.host or text.MISSING,
            failure.reason,
            text.count(failure.rank),
            text.count(failure.exit_code),
            str(failure.phase),
            text.epoch(failure.epoch),
        ]
        for failure in interruptions
    ]
    heads = ["when", "host", "what", "rank", "exit code", "phase", "epoch"]
    return ["<h2>Failures</h2>", _table(heads, rows, words=3)]


def _environment(history: History) -> list[str]:
    hosts = dict.fromkeys(host for phase in history.phases for host in phase.hosts)
    last = history.phases[-1] if history.phases else None
    installed = ", ".join(f"{name} {version}" for name, version in _versions())
    facts = [
        ("Run directory", str(history.path)),
        ("Began", text.moment(history.began)),
        ("Last event", text.moment(history.last_seen)),
        ("Hosts", ", ".join(hosts) or text.MISSING),
        ("Communication", (last.backend if last else "") or text.MISSING),
        ("Device", (last.device if last else "") or text.MISSING),
        ("Threads a rank", text.count(last.threads_per_rank if last else None)),
        (
            "Installed where this page was written",
            f"Python {platform.python_version()}, {installed}",
        ),
    ]
    inner = "".join(f"<dt>{_e(name)}</dt><dd>{_e(value)}</dd>" for name, value in facts)
    return ["<h2>Environment</h2>", f"<dl>{inner}</dl>"]


def _job(history: History) -> list[str]:
    if not history.job_text:
        return []
    return ["<h2>Job file</h2>", f"<pre>{_e(history.job_text)}</pre>"]


def _versions() -> Iterable[tuple[str, str]]:
    for name in VERSIONS:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int, sums: int = 0) -> str:
    """A table whose first `words` columns are text and whose last `sums` rows are sums."""
    top = "".join(f'<th scope="col"{_n(i >= words)}>{_e(h)}</th>' for i, h in enumerate(heads))
    lines = []
    for r, row in enumerate(rows):
        kind = ' class="sum"' if r >= len(rows) - sums else ""
        cells = "".join(f"<td{_n(i >= words)}>{_e(cell)}</td>" for i, cell in enumerate(row))
        lines.append(f"<tr{kind}>{cells}</tr>")
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _n(number: bool) -> str:
    return ' class="n"' if number else ""


def _span(first: float, last: float) -> str:
    if first == last:
        return text.count(first)
    return f"{text.count(first)} → {text.count(last)}"


def _e(words: str) -> str:
    return html.escape(words, quote=True)


def _paths(histories: Sequence[History], out: Path | None) -> ReportPaths:
    if out is None:
        if len(histories) > 1:
            return ReportPaths(Path("report.html"), Path("report.png"))
        run = RunDir(histories[0].path)
        return ReportPaths(run.report, run.figure)
    target = Path(out)
    if target.suffix.lower() not in (".html", ".htm") or target.is_dir():
        target = target / "report.html"
    return ReportPaths(target, target.with_suffix(".png"))


def _replace(path: Path, content: bytes) -> None:
    """Write whole or not at all: someone may have the old page open."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
