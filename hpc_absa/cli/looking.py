"""Commands that look at runs and their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpc_absa.cli.common import Json, print_json, say
from hpc_absa.errors import ExitStatus


def status(
    directory: Annotated[Path, typer.Argument(metavar="D", help="Run directory.")],
    as_json: Json = False,
) -> int:
    """Say where a run stands, from its files alone: while it runs, after its end, after a crash."""
    from hpc_absa import status as standing

    found = standing.status(directory)
    if as_json:
        print_json(found.to_dict())
    else:
        from rich.console import Console

        standing.render(found, Console())
    return ExitStatus.OK


def report(
    directories: Annotated[list[Path], typer.Argument(metavar="D...", help="Run directories.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file; default D/report.html for one run.")
    ] = None,
) -> int:
    """Write one self-contained HTML page, and a PNG, with a run's or several runs' figures."""
    from hpc_absa.report.tensorboard import TensorBoardLog
    from hpc_absa.rundir import RunDir

    for directory in directories:
        if not any(directory.glob("tensorboard/*")):
            TensorBoardLog(RunDir(directory)).close()
    write_report(directories, out)
    return ExitStatus.OK


def write_report(directories: list[Path], out: Path | None) -> None:
    """Write the page and its picture, and say where."""
    from hpc_absa.report import page

    paths = page.write_report(directories, out)
    say(f"report: {paths.html} and {paths.png}")


def replay(
    directory: Annotated[Path, typer.Argument(metavar="D", help="Run directory.")],
    alpha: Annotated[
        float | None, typer.Option(help="What this fall of λ would have decided: schedule.alpha.")
    ] = None,
    kappa: Annotated[
        int | None, typer.Option(help="What this patience would have decided: schedule.kappa.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="What schedule.KEY=VALUE would have; repeatable."
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Derive every decision of a run again from its events, and say what others would have been.

    Exit status 1 where the run's own parameters do not lead to the decisions recorded.
    """
    from hpc_absa import replay as replaying

    changes = [f"schedule.alpha={alpha}"] if alpha is not None else []
    changes += [f"schedule.kappa={kappa}"] if kappa is not None else []
    changes += overrides or []
    own = replaying.replay(directory)
    other = replaying.replay(directory, changes) if changes else None
    if as_json:
        print_json({**own.to_dict(), "other": other.to_dict() if other else None})
    else:
        from rich.console import Console

        for course in filter(None, (own, other)):
            replaying.render(course, Console())
    return ExitStatus.FAILED if own.differing else ExitStatus.OK


def verify(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or a run directory with several.")],
    as_json: Json = False,
) -> int:
    """Check checkpoints against their digests: exit 0 good, 1 damaged, 2 not a checkpoint."""
    from hpc_absa.checkpoint import verification

    results = verification.verify(path)
    if as_json:
        print_json({"checkpoints": [r.to_dict() for r in results]})
    else:
        for result in results:
            print(f"{result.path}: {result.error or 'good'}")
    return max(result.exit_status for result in results)


def spectrum(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="One .h5 of a run.")],
    samples: Annotated[int, typer.Option(min=1, help="Training samples to average over.")] = 512,
    k: Annotated[int, typer.Option("--k", min=1, help="How many top eigenvalues.")] = 5,
    root: Annotated[
        str | None, typer.Option(help="data.root, where the data lies elsewhere now.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Prefix of OUT.h5 and OUT.png; default none is written.")
    ] = None,
    layers: Annotated[
        bool, typer.Option(help="Each parameter's own block too, which takes most of the time.")
    ] = True,
    gauss_newton: Annotated[
        bool, typer.Option("--gauss-newton", help="That part of the Hessian alone.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Compute top eigenvalues, trace and density of the Hessian at a checkpoint.

    Also negative directions, the loss along the top eigenvectors, and every layer's own block.
    Alone, or over several ranks: `mpirun -np 4 hpc-absa spectrum CHECKPOINT`.
    """
    from hpc_absa.training import inspection

    matrix = "gauss-newton" if gauss_newton else "hessian"
    return inspection.spectrum(
        checkpoint, root, out, as_json, samples=samples, k=k, layers=layers, matrix=matrix
    )
