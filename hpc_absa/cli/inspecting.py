"""Commands that read runs and their checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from hpc_absa.cli.options import Directory, Json, folder, print_json, print_line
from hpc_absa.console import rich_console
from hpc_absa.errors import ExitStatus, UsageError


def status(
    directory: Directory,
    as_json: Json = False,
    watch: Annotated[
        bool, Option("--watch", "-w", help="Show it again every two seconds until the run ends.")
    ] = False,
) -> int:
    """Show the state of a run, from its files alone: while it runs, after its end or a crash.

    Examples: `hpc-absa status runs/digits` · `hpc-absa status runs/digits --watch`
    """
    from hpc_absa import status as run_status

    if watch and as_json:
        raise UsageError("--watch: expected without --json, which prints one object and ends")
    if watch:
        from hpc_absa.cli import following

        following.watch(directory, rich_console())
        return ExitStatus.OK
    current = run_status.status(directory)
    if as_json:
        print_json(current.to_dict())
    else:
        run_status.render(current, rich_console())
    return ExitStatus.OK


def report(
    directories: Annotated[
        list[Path], Argument(metavar="D...", help="Run directories, or the folder of a sweep.")
    ],
    out: Annotated[
        Path | None, Option(help="HTML file or folder; default D, of several the current folder.")
    ] = None,
    figures: Annotated[
        Path | None,
        Option(parser=folder, metavar="DIR", help="Also the figures as PDF, SVG and PNG."),
    ] = None,
    scalars: Annotated[
        Path | None,
        Option(metavar="FILE", help="Also all measurements as a table: FILE.csv or .parquet."),
    ] = None,
    wandb: Annotated[
        Path | None,
        Option(parser=folder, metavar="DIR", help="Also for Weights & Biases, to sync later."),
    ] = None,
    trackio: Annotated[
        Path | None, Option(parser=folder, metavar="DIR", help="Also for trackio.")
    ] = None,
) -> int:
    """Write the curves and tables of one or several runs to one HTML page, and a PNG.

    The page needs no network. Runs that differ in their seed only are drawn as mean and band.

    Examples: `hpc-absa report runs/digits` · `hpc-absa report runs/a runs/b --out both.html` ·
    `hpc-absa report runs/cifar10-table` (a sweep) ·
    `hpc-absa report runs/digits --figures paper --scalars digits.csv`
    """
    from hpc_absa import status as run_status
    from hpc_absa.report.compare import run_dirs
    from hpc_absa.report.figures import paths
    from hpc_absa.report.scalars import MARK, writer_for
    from hpc_absa.report.tensorboard import TensorBoardLog
    from hpc_absa.report.trackers import require
    from hpc_absa.rundir import RunDir
    from hpc_absa.rundir.files import require_replaceable

    trackers = {k: v for k, v in {"wandb": wandb, "trackio": trackio}.items() if v}
    # refuse what cannot be written before anything is written
    if scalars:
        writer_for(scalars)
        if scalars.exists():
            require_replaceable(scalars, "--scalars", MARK)
    for path in paths(figures) if figures and figures.is_dir() else ():
        require_replaceable(path, "--figures")
    for tracker in trackers:
        require(tracker)
    runs = run_dirs(directories)
    for run in runs:
        if not any(run.glob("tensorboard/*")):
            with contextlib.suppress(OSError):  # a run of another user's
                TensorBoardLog(RunDir(run)).close()
    write_report(directories, out, {run: run_status.status(run).state for run in runs})
    if figures or scalars or trackers:
        _write_files(runs, figures, scalars, trackers)
    return ExitStatus.OK


def write_report(
    directories: list[Path], out: Path | None, states: Mapping[Path, str] | None = None
) -> None:
    """Write the page and its image, and print their paths."""
    from hpc_absa.report import page

    paths = page.write_report(directories, out, states)
    print_line(f"report: {paths.html} and {paths.png}")


def _write_files(
    runs: list[Path],
    figures: Path | None,
    scalars: Path | None,
    trackers: Mapping[str, Path],
) -> None:
    from hpc_absa.report.figures import save
    from hpc_absa.report.history import labels, load
    from hpc_absa.report.scalars import export
    from hpc_absa.report.trackers import write

    histories = [load(run) for run in runs]
    named = dict(zip(labels(histories), histories, strict=True))
    if figures:
        written = save(histories, figures)
        print_line(f"figures: {', '.join(path.name for path in written)} in {figures}")
    if scalars:
        print_line(f"scalars: {scalars}, {export(named, scalars)} rows")
    for tracker, directory in trackers.items():
        write(tracker, named, directory)
        print_line(f"{tracker}: {directory}")


def serve(
    directories: Annotated[
        list[Path], Argument(metavar="D...", help="Run directories, or folders with some.")
    ],
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port; 0 takes any free one.")] = 8265,
    token: Annotated[
        bool, Option("--token", help="Ask for a token on this machine too, as on shared nodes.")
    ] = False,
) -> int:
    """Serve a live, read-only web page over running and finished runs.

    By default it listens on this machine only. From a laptop, forward the port:
    `ssh -L 8265:localhost:8265 NODE`. On another address (`--host`) a token is needed, which is in
    the printed address.

    Examples: `hpc-absa serve runs` · `hpc-absa serve runs/digits --port 0`
    """
    from hpc_absa.serve.server import serve as run_server

    run_server(directories, host, port, token, print_line)
    return ExitStatus.OK


def replay(
    directory: Directory,
    alpha: Annotated[
        float | None, Option(help="Replay with this schedule.alpha: growth at λ ≤ reference/alpha.")
    ] = None,
    kappa: Annotated[
        float | None, Option(help="Replay with this schedule.kappa: patience, in decisions.")
    ] = None,
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
    checkpoint: Annotated[
        Path, Argument(metavar="CHECKPOINT", help="A run's .h5 file, or a run directory.")
    ],
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
