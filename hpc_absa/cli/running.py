"""Commands that train: `run`, `compare`, `cancel`, and what they have started."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpc_absa.cli.common import (
    AllowChanged,
    JobFile,
    MaxRanks,
    Overrides,
    RunFolder,
    folder,
    say,
)
from hpc_absa.cli.looking import write_report
from hpc_absa.errors import ExitStatus

if TYPE_CHECKING:
    from hpc_absa.config import Job
    from hpc_absa.report.tensorboard import TensorBoardLog
    from hpc_absa.rundir import RunDir


def run(
    job: JobFile,
    run_dir: RunFolder = None,
    launcher: Annotated[
        str | None,
        typer.Option(
            help="mpirun, horovodrun, srun, or slurm: a chain of batch jobs; in place of the job's."
        ),
    ] = None,
    max_ranks: MaxRanks = None,
    overrides: Overrides = None,
    allow_changed: AllowChanged = None,
    hosts: Annotated[
        str | None,
        typer.Option("--hosts", "-H", help="host:slots,... in place of the job's launch.hosts."),
    ] = None,
    hostfile: Annotated[
        Path | None, typer.Option(help="File with a host a line, in place of --hosts.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Remove the run directory first and begin anew.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command of the next phase; start nothing.")
    ] = False,
) -> int:
    """Run a job to its end, phase by phase, with more ranks as the batch grows.

    On a run directory that holds an unfinished run it goes on from the newest good checkpoint; so
    after Ctrl-C, a crash or a reboot, the same command continues. Exit status: 0 done, 1 failed,
    2 bad usage or job file, 75 stopped on request with everything saved.
    """
    from hpc_absa import config, worldsize
    from hpc_absa.report.tensorboard import TensorBoardLog
    from hpc_absa.rundir import RunDir
    from hpc_absa.supervisor import driver

    extra = [f"launch.launcher={launcher}"] if launcher else []
    extra += [f"ranks.max={max_ranks}"] if max_ranks else []
    extra += [f"launch.hosts={hosts}"] if hosts else []
    extra += [f"launch.hostfile={hostfile}"] if hostfile else []
    loaded = config.load(job, (*(overrides or ()), *extra))
    place = RunDir(run_dir or driver.default_run_dir(loaded))
    if loaded.launch.launcher == "slurm":
        return _run_chain(loaded, place, tuple(allow_changed or ()), fresh, dry_run)
    resolved = {"ranks": loaded.ranks.model_copy(update={"max": worldsize.limit(loaded)})}
    loaded = loaded.model_copy(update=resolved)
    board = TensorBoardLog(place)
    supervisor = driver.Supervisor(loaded, place, tuple(allow_changed or ()), _onto(board))
    if dry_run:
        print(supervisor.launch_command())
        return ExitStatus.OK
    if fresh:
        driver.clear(place)
    if _already_done(place):
        return ExitStatus.OK
    status = supervisor.supervise()
    board.close()
    # Whoever is asked to stop may have seconds: the report waits for the end, or `hpc-absa report`.
    if place.events.exists() and status != ExitStatus.STOPPED:
        write_report([place.path], None)
    return status


def _onto(board: TensorBoardLog) -> Callable[[str], None]:
    """Shows a line, and brings the figures up to date."""

    def say_and_update(line: str) -> None:
        say(line)
        with contextlib.suppress(OSError):  # figures may wait, the run may not
            board.update()

    return say_and_update


def _run_chain(job: Job, run: RunDir, allowed: tuple[str, ...], fresh: bool, dry_run: bool) -> int:
    from hpc_absa.supervisor import driver, follow

    follower = follow.Follower(job, run, allowed, say)
    if dry_run:
        print(follower.dry(), end="")
        return ExitStatus.OK
    if fresh:
        follower.refuse_if_at_work()
        driver.clear(run)
    return ExitStatus.OK if _already_done(run) else follower.follow()


def _already_done(run: RunDir) -> bool:
    from hpc_absa.supervisor import driver

    if done := driver.finished(run):
        say(
            f"{run.path}: already done after {done['steps']} steps; "
            "--fresh begins anew, --run-dir names another place"
        )
    return done is not None


def compare(
    sweep: Annotated[
        Path, typer.Argument(metavar="SWEEP", help="Sweep file (TOML); jobs/ has examples.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the sweep; default runs/<sweep name>.")
    ] = None,
    side_by_side: Annotated[
        int | None, typer.Option(min=1, help="Cells at work at a time, in place of the sweep's.")
    ] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="Try failed cells again, from their last checkpoints.")
    ] = False,
    overrides: Overrides = None,
    allow_changed: AllowChanged = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say where each cell stands and print the tables so far."),
    ] = False,
) -> int:
    """Run a grid of schedules, batches and seeds, and print the talk's two tables of it.

    Each cell is a run of its own below the sweep's folder. The same command goes on where it was
    stopped; the tables are also written as Markdown, CSV, LaTeX and HTML. Exit status: 0 all cells
    done, 1 some failed (`--retry` tries them again), 75 stopped.
    """
    from hpc_absa.study.command import compare as run_sweep

    words, allowed = tuple(overrides or ()), tuple(allow_changed or ())
    return run_sweep(
        sweep, out, side_by_side=side_by_side, retry=retry, dry_run=dry_run,
        overrides=words, allow_changed=allowed,
    )  # fmt: skip


def cancel(
    directory: Annotated[Path, typer.Argument(metavar="D", help="Run directory.")],
    now: Annotated[
        bool, typer.Option("--now", help="Do not wait for a checkpoint: end its batch job at once.")
    ] = False,
) -> int:
    """Have a run save and stop, from anywhere; of a chain of batch jobs, also those that wait.

    The command that began the run goes on with it.
    """
    from hpc_absa.supervisor import cancel as cancelling

    for line in cancelling.cancel(directory, now):
        say(line)
    return ExitStatus.OK


def train(
    job: JobFile,
    run_dir: Annotated[
        Path, typer.Option("--run-dir", parser=folder, metavar="D", help="Run directory.")
    ],
    overrides: Overrides = None,
    allow_changed: AllowChanged = None,
) -> None:
    """Be one rank: what horovodrun, mpirun and srun start.

    For example `mpirun -np 4 hpc-absa train jobs/digits.toml --run-dir runs/digits`

    It works alone and at any number of ranks: it resumes from the newest good checkpoint, trains
    until the job is done or a decision asks for more ranks, and prints the command to go on.
    """
    gc.disable()  # until the world stands: imports leave no garbage, and looking for it takes 0.3 s
    from hpc_absa.training import worker

    _leave(worker.main(job, run_dir, tuple(overrides or ()), tuple(allow_changed or ())))


def _leave(status: int) -> None:
    """End this process without unloading torch: 0.8 s, for which the next world would wait."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def link(
    directory: Annotated[Path, typer.Argument(metavar="D", help="Run directory.")],
    number: Annotated[int, typer.Argument(metavar="N", min=1, help="The link's number.")],
    allow_changed: AllowChanged = None,
) -> int:
    """Be one batch job of a chain: what `hpc-absa run --launcher slurm` has Slurm start.

    It trains on the job's nodes until the run is done, or a decision asks for more ranks, or the
    time is up, and submits the next job of the chain.
    """
    from hpc_absa.report.tensorboard import TensorBoardLog
    from hpc_absa.rundir import RunDir
    from hpc_absa.supervisor import driver
    from hpc_absa.supervisor.link import LinkRun

    run = RunDir(directory)
    board = TensorBoardLog(run)
    status = LinkRun(run, number, tuple(allow_changed or ()), _onto(board)).work()
    board.close()
    if driver.finished(run):
        write_report([run.path], None)
    return status
