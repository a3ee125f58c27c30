"""A run on the terminal while it runs: `status --watch` and the progress bar of `run`."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from hpc_absa.report import format as fmt
from hpc_absa.report.history import job_table, load, read_job, require_run
from hpc_absa.report.timing import finite, latest
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.events import effective
from hpc_absa.status import ACTIVE, Status, block, seconds_left, status

CHAIN_SECONDS = 30.0
"""Between two looks at a chain of batch jobs, for which Slurm is asked."""
BAR_WIDTH = 16
"""Characters of a progress bar."""
BAR_EVENTS = 200
"""Last events that it is made from."""


def watch(path: Path, console: Console, seconds: float = 2.0) -> None:
    """Render the status again and again until nothing runs; off a terminal, a line on each change.

    Raises:
        UsageError: `path` is not a run directory.
    """
    run = require_run(path)
    if not console.is_terminal:
        last = ""
        while True:
            now = status(path, history=load(path, run))
            if (line := _one_line(now)) != last:
                console.print(line, soft_wrap=True, highlight=False)
                last = line
            if now.state not in ACTIVE:
                return
            time.sleep(CHAIN_SECONDS if now.chain else seconds)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            now = status(path, history=load(path, run))
            live.update(block(now), refresh=True)
            if now.state not in ACTIVE:
                return
            time.sleep(CHAIN_SECONDS if now.chain else seconds)


def _one_line(now: Status) -> str:
    words = {
        "": now.state,
        "epoch": "" if now.epoch is None else fmt.epoch(now.epoch),
        "step": "" if now.step is None else str(now.step),
        "loss": "" if now.train_loss is None else fmt.number(now.train_loss),
        "accuracy": "" if now.test_accuracy is None else fmt.percent(now.test_accuracy),
        "batch": "" if now.global_batch is None else str(now.global_batch),
        "ranks": "" if now.ranks is None else str(now.ranks),
    }
    return " · ".join(f"{name} {text}".strip() for name, text in words.items() if text)


def progress_bar(run: RunDir, columns: int) -> str:
    """Where a running job is, in one line of at most `columns` characters; empty before a step."""
    events = effective(run.log.read()[-BAR_EVENTS:])
    # An `epoch` event is written once its state is saved, possibly after later ones.
    epoch = max((finite(event.get("epoch"), -1.0) for event in events), default=-1.0)
    epochs = finite(job_table(read_job(run)[0], "train").get("epochs"))
    if epoch < 0 or not epochs > 0:
        return ""
    done = min(1.0, epoch / epochs)
    left = fmt.duration(seconds_left(events, epochs - epoch))
    words = [
        f"epoch {fmt.epoch(epoch)}/{fmt.epoch(epochs)}",
        f"loss {fmt.number(latest(events, 'train_loss'), 3)}",
        f"batch {fmt.count(latest(events, 'global_batch'))}",
        f"ranks {fmt.count(latest(events, 'ranks'))}",
        f"{left} left",
    ]
    bar = "█" * round(BAR_WIDTH * done) + "░" * (BAR_WIDTH - round(BAR_WIDTH * done))
    return f"{bar} {done:4.0%} · {' · '.join(w for w in words if fmt.MISSING not in w)}"[:columns]
