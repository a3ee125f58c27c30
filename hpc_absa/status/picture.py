"""Where a run stands, as people read it."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hpc_absa.report import text
from hpc_absa.status.facts import CheckpointFile, State, Status
from hpc_absa.supervisor.standing import LinkStanding

STATE_STYLES: Mapping[State, str] = {
    "not started": "bold",
    "queued": "bold blue",
    "running": "bold blue",
    "done": "bold green",
    "stopped": "bold yellow",
    "interrupted": "bold red",
    "failed": "bold red",
}


def render(now: Status, console: Console) -> None:
    """Print it for people."""
    head = Text.assemble((now.name, "bold"), "  ", (now.state, STATE_STYLES[now.state]))
    console.print(head)
    console.print(Text(now.explanation, style="dim"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, words in _lines(now):
        grid.add_row(name, Text(words))
    console.print(grid)
    if now.next_command:
        # No wrapping: a command that is broken over lines cannot be copied.
        console.print(
            Text.assemble("Next: ", (now.next_command, "bold")),
            soft_wrap=True,
            highlight=False,
        )


def _lines(now: Status) -> list[tuple[str, str]]:
    """The lines of the picture for people, those without anything to say left out."""
    epochs = text.epoch(now.epoch) + (f" of {text.epoch(now.epochs)}" if now.epochs else "")
    lines = [
        ("schedule", now.schedule),
        ("phase", "" if now.phase is None else str(now.phase)),
        ("epoch", "" if now.epoch is None else epochs),
        ("step", "" if now.step is None else text.count(now.step)),
        ("samples", "" if now.samples is None else text.count(now.samples)),
        ("ranks", _ranks(now)),
        ("global batch", "" if now.global_batch is None else text.count(now.global_batch)),
        ("learning rate", "" if now.lr is None else text.number(now.lr)),
        ("eigenvalue", _eigenvalue(now)),
        ("last decision", now.last_decision or ""),
        ("test accuracy", "" if now.test_accuracy is None else text.percent(now.test_accuracy)),
        ("checkpoint", _checkpoint(now.checkpoint)),
        ("failures", f"{now.failures}, last: {now.last_failure}" if now.failures else ""),
        ("time used", text.duration(now.seconds_used) if now.phase is not None else ""),
        ("time left", _left(now)),
        ("rank-seconds", _spent(now)),
        ("last event", _ago(now.last_event_age)),
        ("chain", "\n".join(map(_link, now.chain))),
    ]
    return [(name, words) for name, words in lines if words]


def _ranks(now: Status) -> str:
    if now.ranks is None:
        return ""
    wanted = now.next_ranks not in (None, now.ranks) and now.state != "done"
    return text.count(now.ranks) + (f", next phase {now.next_ranks}" if wanted else "")


def _eigenvalue(now: Status) -> str:
    if now.eigenvalue is None:
        return ""
    against = "" if now.reference is None else f", reference {text.number(now.reference)}"
    return f"λ {text.number(now.eigenvalue)}{against}"


def _checkpoint(file: CheckpointFile | None) -> str:
    return f"{file.name}, {text.size(file.bytes)}, {_ago(file.age_seconds)}" if file else ""


def _spent(now: Status) -> str:
    if now.rank_seconds_of_largest <= 0:
        return ""
    return (
        f"{now.rank_seconds:.0f}, where the largest world throughout would have taken "
        f"{now.rank_seconds_of_largest:.0f}"
    )


def _left(now: Status) -> str:
    if now.seconds_left is None or now.state == "done":
        return ""
    return f"about {text.duration(now.seconds_left)} at the present pace"


def _ago(seconds: float | None) -> str:
    return "" if seconds is None else f"{text.duration(max(0.0, seconds))} ago"


def _link(link: LinkStanding) -> str:
    nodes = "1 node" if link.nodes == 1 else f"{link.nodes} nodes"
    ranks = "1 rank" if link.ranks == 1 else f"{link.ranks} ranks"
    return f"link {link.link}, job {link.job_id} ({link.name}), {nodes}, {ranks}: {link.state}"
