"""What `hpc-absa compare` does, put together."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from hpc_absa.errors import ExitStatus
from hpc_absa.study import sweep as sweeps
from hpc_absa.study import tables
from hpc_absa.study.folder import StudyDir
from hpc_absa.study.progress import Progress
from hpc_absa.study.runner import Runner, state


def compare(
    path: Path,
    out: Path | None,
    *,
    side_by_side: int | None,
    retry: bool,
    dry_run: bool,
    overrides: tuple[str, ...],
    allow_changed: tuple[str, ...],
) -> ExitStatus:
    """Run the sweep in `path` as far as it is not done, print and write its tables.

    Raises:
        UsageError: a bad sweep or job, or a folder whose cells are of other jobs.
    """
    sweep, cells = sweeps.load(path, overrides)
    study = StudyDir(out or Path("runs") / sweep.name)

    def keep() -> None:
        tables.write(study.tables, tables.of(study, cells))

    if dry_run:
        for cell in cells:
            print(f"{cell.name}: {state(study, cell)}")
        status = ExitStatus.OK
    else:
        runner = Runner(
            study,
            cells,
            side_by_side=side_by_side or sweep.side_by_side,
            retry=retry,
            progress=Progress(study, cells, Console(stderr=True)),
            allow_changed=allow_changed,
        )
        status = runner.run(keep)
        keep()
    for table in tables.of(study, cells).values():
        print(f"\n{table.to_markdown()}", end="")
    if not dry_run:
        print(f"\nwritten: {study.tables}/*.md, *.csv, *.tex, *.html")
    return status
