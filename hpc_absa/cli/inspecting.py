"""Commands that read runs and their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from hpc_absa.cli.options import Directory, Json, print_json, print_line
from hpc_absa.console import rich_console
from hpc_absa.errors import ExitStatus


def status(directory: Directory, as_json: Json = False) -> int:
    """Show the state of a run, from its files alone: while it runs, after its end or a crash.

    Example: `hpc-absa status runs/digits`
    """
    from hpc_absa import status as run_status

    current = run_status.status(directory)
    if as_json:
        print_json(current.to_dict())
    else:
        run_status.render(current, rich_console())
    return ExitStatus.OK


def report(
    directories: Annotated[list[Path], Argument(metavar="D...", help="Run directories.")],
    out: Annotated[Path | None, Option(help="HTML file; for one run D/report.html.")] = None,
) -> int:
    """Write the figures and tables of one or several runs to one HTML page, and a PNG.

    Example: `hpc-absa report runs/a runs/b --out comparison.html`
    """
    from hpc_absa.report.tensorboard import TensorBoardLog
    from hpc_absa.rundir import RunDir

    for directory in directories:
        if not any(directory.glob("tensorboard/*")):
            TensorBoardLog(RunDir(directory)).close()
    write_report(directories, out)
    return ExitStatus.OK


def write_report(directories: list[Path], out: Path | None) -> None:
    """Write the page and its image, and print their paths."""
    from hpc_absa.report import page

    paths = page.write_report(directories, out)
    print_line(f"report: {paths.html} and {paths.png}")


def replay(
    directory: Directory,
    alpha: Annotated[float | None, Option(help="Another growth factor, schedule.alpha.")] = None,
    kappa: Annotated[float | None, Option(help="Another patience, schedule.kappa.")] = None,
    overrides: Annotated[
        list[str] | None,
        Option("--set", metavar="KEY=VALUE", help="Replay with schedule.KEY=VALUE; repeatable."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Compute every decision of a run again from its events, also with other parameters.

    Example: `hpc-absa replay runs/digits --alpha 1.5`

    Exit status 1 if the run's own parameters lead to other decisions than those recorded.
    """
    from hpc_absa import replay as replaying

    changes = [f"schedule.alpha={alpha}"] if alpha is not None else []
    changes += [f"schedule.kappa={kappa:g}"] if kappa is not None else []
    changes += overrides or []
    own = replaying.replay(directory)
    other = replaying.replay(directory, changes) if changes else None
    if as_json:
        print_json({**own.to_dict(), "other": other.to_dict() if other else None})
    else:
        for replayed in filter(None, (own, other)):
            replaying.render(replayed, rich_console())
    return ExitStatus.FAILED if own.differing else ExitStatus.OK


def verify(
    path: Annotated[Path, Argument(help="A checkpoint, or a run directory.")],
    as_json: Json = False,
) -> int:
    """Compare checkpoints with their digests: exit status 0 good, 1 damaged, 2 not a checkpoint.

    Example: `hpc-absa verify runs/digits`
    """
    from hpc_absa.checkpoint import manager

    results = manager.verify(path)
    if as_json:
        print_json({"checkpoints": [r.to_dict() for r in results]})
    else:
        for result in results:
            print(f"{result.path}: {result.error or 'good'}")
    return max(result.exit_status for result in results)


def spectrum(
    checkpoint: Annotated[Path, Argument(metavar="CHECKPOINT", help="A run's .h5 file.")],
    samples: Annotated[int, Option(min=1, help="Training samples to average.")] = 512,
    k: Annotated[int, Option("--k", min=1, help="Number of top eigenvalues.")] = 5,
    root: Annotated[str | None, Option(help="Folder of the data set (data.root).")] = None,
    out: Annotated[Path | None, Option(help="Write OUT.h5 and OUT.png.")] = None,
    layers: Annotated[bool, Option(help="Also the block of each parameter (slow).")] = True,
    gauss_newton: Annotated[
        bool, Option("--gauss-newton", help="Of the Gauss-Newton part of the Hessian only.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Compute top eigenvalues, trace and density of the Hessian at a checkpoint.

    Also negative eigenvalues, the loss along the top eigenvectors, and the block of each layer.
    Runs alone or on several ranks. Example: `mpirun -np 4 hpc-absa spectrum CHECKPOINT`
    """
    from hpc_absa.training import spectrum as command
    from hpc_absa.training.load import Source

    matrix = "gauss-newton" if gauss_newton else "hessian"
    source = Source(checkpoint, root)
    return command.spectrum(
        source, out, as_json, samples=samples, k=k, layers=layers, matrix=matrix
    )
