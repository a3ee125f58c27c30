"""`hpc-absa list`: the runs in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument

from hpc_absa.cli.options import Json, print_json
from hpc_absa.console import rich_console
from hpc_absa.errors import ExitStatus, UsageError

if TYPE_CHECKING:
    from hpc_absa.status import Status


def list_runs(
    directory: Annotated[Path, Argument(metavar="[DIR]", help="Folder; default runs.")] = Path(
        "runs"
    ),
    as_json: Json = False,
) -> int:
    """List the runs in a folder and in the folders below it, with their states.

    Example: `hpc-absa list runs`

    With `--json`: `runs`, each as `hpc-absa status --json` describes it.
    """
    from hpc_absa import status
    from hpc_absa.report.compare import find_runs

    if not directory.is_dir():
        raise UsageError(f"{directory}: no such folder; expected one that has run directories")
    runs = [status.status(path) for path in find_runs(directory)]
    if as_json:
        print_json({"runs": [run.to_dict() for run in runs]})
    else:
        _render(runs, directory)
    return ExitStatus.OK


def _render(runs: list[Status], directory: Path) -> None:
    from rich.table import Table
    from rich.text import Text

    from hpc_absa.report import format as fmt
    from hpc_absa.status import STATE_STYLES

    if not runs:
        print(f"{directory}: no runs")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("run", "state"):
        table.add_column(column, no_wrap=True)
    for column in ("epoch", "ranks", "batch", "failures", "time used"):
        table.add_column(column, no_wrap=True, justify="right")
    for run in runs:
        table.add_row(
            run.path,
            Text(run.state, STATE_STYLES[run.state]),
            f"{fmt.epoch(run.epoch)}/{fmt.epoch(run.epochs)}" if run.epochs else fmt.MISSING,
            fmt.count(run.ranks),
            fmt.count(run.global_batch),
            str(run.failures or ""),
            fmt.duration(run.seconds_used),
        )
    console = rich_console()
    console.width = 1000  # a path is never cut off; a terminal that is too narrow wraps the lines
    console.print(table)
