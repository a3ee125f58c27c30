"""Commands that train: `run`, `launch`, `compare`, `cancel`, and those that launchers start."""

from __future__ import annotations

import contextlib
import gc
import os
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from hpc_absa import console
from hpc_absa.cli.inspecting import write_report
from hpc_absa.cli.options import (
    AllowChanged,
    Directory,
    JobFile,
    MaxRanks,
    Overrides,
    RunFolder,
    folder,
    print_line,
)
from hpc_absa.errors import ExitStatus, UsageError

if TYPE_CHECKING:
    from hpc_absa.report.tensorboard import TensorBoardLog
    from hpc_absa.rundir import RunDir
    from hpc_absa.supervisor.program import Program


Launcher = Annotated[
    str | None,
    Option(help="mpirun, horovodrun, srun, or slurm (a chain of batch jobs); replaces the job's."),
]
Hosts = Annotated[
    str | None,
    Option("--hosts", "-H", help="host:slots,... in place of the job's launch.hosts."),
]
HostFile = Annotated[Path | None, Option(help="File with one host per line.")]
Fresh = Annotated[bool, Option("--fresh", help="First remove an earlier run in D.")]
DryRun = Annotated[bool, Option("--dry-run", help="Only print the next command.")]


def run(
    job: JobFile,
    run_dir: RunFolder = None,
    launcher: Launcher = None,
    max_ranks: MaxRanks = None,
    overrides: Overrides = None,
    allow_changed: AllowChanged = None,
    hosts: Hosts = None,
    hostfile: HostFile = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
) -> int:
    """Run a job to its end, phase by phase, with more ranks as the batch grows.

    Example: `hpc-absa run jobs/digits.toml --max-ranks 2 --set train.epochs=3`

    If the run directory holds an unfinished run, it is continued from the newest good checkpoint:
    after Ctrl-C, a crash or a reboot, give the same command again. Exit status: 0 done, 1 failed,
    2 wrong usage or job file, 75 stopped on request with everything saved.
    """
    console.never_fail()
    from hpc_absa import config
    from hpc_absa.rundir import RunDir
    from hpc_absa.supervisor.program import SCRIPT, JobProgram
    from hpc_absa.supervisor.run_state import default_run_dir

    options = _settings(launcher, max_ranks, hosts, hostfile)
    loaded = config.load(job, (*(overrides or ()), *options))
    if loaded.data.name == SCRIPT:
        raise UsageError(
            f"{job}: the run of a script; continue it with hpc-absa launch --run-dir "
            f"{shlex.quote(str(job.parent))} -- COMMAND"
        )
    directory = RunDir(run_dir or default_run_dir(loaded))
    return _supervise(JobProgram(loaded, tuple(allow_changed or ())), directory, fresh, dry_run)


def launch(
    command: Annotated[
        list[str] | None,
        Argument(metavar="-- COMMAND", help="One rank: a program and its arguments."),
    ] = None,
    run_dir: Annotated[
        Path | None,
        Option("--run-dir", parser=folder, metavar="D", help="Run directory; default runs/SCRIPT."),
    ] = None,
    launcher: Launcher = None,
    ranks: Annotated[
        int | None, Option(min=1, help="Ranks of the first phase, ranks.initial; default 1.")
    ] = None,
    max_ranks: MaxRanks = None,
    settings: Annotated[
        Path | None,
        Option(
            "--config", metavar="FILE", help="TOML file with tables [ranks], [train] and [launch]."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set a key of these tables, e.g. --set launch.max_restarts=5; repeatable.",
        ),
    ] = None,
    allow_changed: AllowChanged = None,
    hosts: Hosts = None,
    hostfile: HostFile = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
) -> int:
    """Run your own script, which uses hpc_absa.Run, with more ranks as its batch grows.

    Example: `hpc-absa launch --max-ranks 4 -- python train.py --data DIR`

    Phases, restarts, signals and exit statuses are those of `hpc-absa run`. Without a command, the
    one stored in D is continued with its settings.
    """
    console.never_fail()
    from hpc_absa.rundir import RunDir
    from hpc_absa.supervisor.program import ScriptProgram, make_script
    from hpc_absa.supervisor.run_state import default_run_dir

    options = _settings(launcher, max_ranks, hosts, hostfile)
    options += [f"ranks.initial={ranks}"] if ranks else []
    script = make_script(command or [], run_dir, settings, (*(overrides or ()), *options))
    program = ScriptProgram(script, tuple(allow_changed or ()))
    program.resolve()  # refuse a command that cannot be executed before anything is written
    return _supervise(program, RunDir(run_dir or default_run_dir(script)), fresh, dry_run)


def _settings(
    launcher: str | None, max_ranks: int | None, hosts: str | None, hostfile: Path | None
) -> list[str]:
    """Options of a command as overrides of keys."""
    options = {
        "launch.launcher": launcher,
        "ranks.max": max_ranks,
        "launch.hosts": hosts,
        "launch.hostfile": hostfile,
    }
    return [f"{key}={value}" for key, value in options.items() if value]


def _supervise(program: Program, directory: RunDir, fresh: bool, dry_run: bool) -> int:
    """Run or continue what `program` launches in `directory`, to the end or the next stop."""
    from hpc_absa import worldsize
    from hpc_absa.cli.following import progress_bar
    from hpc_absa.report.tensorboard import TensorBoardLog
    from hpc_absa.supervisor import run_state
    from hpc_absa.supervisor.follower import Follower
    from hpc_absa.supervisor.supervisor import Supervisor

    board = lines = None
    settings = program.settings
    supervised = settings.launch.launcher != "slurm"  # by this process
    if not supervised:
        follower = Follower(program, directory, print_line)
        if dry_run:
            print(follower.dry_run(fresh), end="")
            return ExitStatus.OK
        if fresh:
            follower.refuse_if_active()
        start: Callable[[], ExitStatus] = follower.follow
    else:
        most, gpus = worldsize.limit(settings), worldsize.gpus_here(settings)
        if 0 < gpus < most:
            count = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
            text = f"{count} here: at most {gpus} of {most} ranks, which accumulate gradients"
            print(text, file=sys.stderr)
            most = gpus
        most = max(most, settings.ranks.initial)
        ranks = settings.ranks.model_copy(update={"max": most})
        program.settings = settings.model_copy(update={"ranks": ranks})
        board = TensorBoardLog(directory)
        footer = partial(progress_bar, directory)
        lines = console.LineQueue(_show_and_update(board), footer)
        supervisor = Supervisor(program, directory, lines)
        if dry_run:
            print(supervisor.launch_command(fresh))
            return ExitStatus.OK
        start = supervisor.supervise
    if fresh:
        run_state.clear(directory)
    done = run_state.finished(directory)
    if done:
        program.require_same(directory)
    if done and not (supervised and program.differs(directory)):
        print_line(
            f"{directory.path}: already done after {done.get('steps')} steps; "
            "--fresh starts again, --run-dir names another folder"
        )
        return ExitStatus.OK
    try:
        status = start()
    finally:
        if lines:
            lines.close()
    # After a stop there may be only seconds left: `hpc-absa report` can write the page later.
    _write_figures(directory, board, page=board is not None and status != ExitStatus.STOPPED)
    return status


def _show_and_update(board: TensorBoardLog) -> Callable[[str], None]:
    """Shows a line, and updates the TensorBoard files."""

    def show_and_update(line: str) -> None:
        print_line(line)
        with contextlib.suppress(OSError):  # the run must not fail because of its figures
            board.update()

    return show_and_update


def _write_figures(run: RunDir, board: TensorBoardLog | None, page: bool) -> None:
    """Finish the TensorBoard files and write the page; the exit status is the run's alone."""
    try:
        if board:
            board.close()
        if page and run.events.exists():
            write_report([run.path], None)
    except Exception as error:  # whatever it is, the run has not failed
        print_line(f"warning: the report could not be written: {type(error).__name__}: {error}")


def compare(
    sweep: Annotated[Path, Argument(metavar="SWEEP", help="Sweep file (TOML); see jobs/.")],
    out: Annotated[Path | None, Option(help="Folder; default runs/NAME.")] = None,
    side_by_side: Annotated[
        int | None,
        Option(min=1, help="Cells that run at the same time, in place of the sweep's."),
    ] = None,
    retry: Annotated[bool, Option("--retry", help="Run failed cells again.")] = False,
    overrides: Overrides = None,
    allow_changed: AllowChanged = None,
    attacks: Annotated[
        str | None,
        Option(metavar="A,B", help="Also a table of accuracy under attack: fgsm,pgd,tr-l2-easy."),
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print states and tables only.")] = False,
) -> int:
    """Run a grid of schedules, batch sizes and seeds, and print its tables.

    They are the talk's two, and one of growths by cause; a figure shows λ of all cells.
    Each cell is a run in the sweep's folder. The same command continues a sweep that was stopped.
    The tables are also written as Markdown, CSV, LaTeX and HTML.
    Example: `hpc-absa compare jobs/cpu/cifar10-table.toml --set data.root=DIR --dry-run`

    Exit status: 0 all cells done, 1 some failed (`--retry` runs them again), 75 stopped.
    """
    console.never_fail()
    from hpc_absa.study import robust, tables
    from hpc_absa.study.runner import Progress, Runner
    from hpc_absa.study.sweep import StudyDir, load

    loaded, cells = load(sweep, tuple(overrides or ()))
    study = StudyDir(out or Path("runs") / loaded.name, cells)
    status = ExitStatus.OK
    if dry_run:
        for cell in cells:
            print(f"{cell.name}: {study.state(cell)}")
    else:
        status = Runner(
            study,
            Progress(study, console.rich_console(stderr=True)),
            side_by_side=side_by_side or loaded.side_by_side,
            retry=retry,
            allow_changed=tuple(allow_changed or ()),
        ).run()
        if attacks and status in (ExitStatus.OK, ExitStatus.FAILED):
            if not robust.measure(study, attacks, print_line):
                status = ExitStatus.FAILED
            tables.write(study)
    for table in tables.of(study).values():
        print(f"\n{table.to_markdown()}", end="")
    if not dry_run:
        print(f"\nwritten: {study.tables}/*.md, *.csv, *.tex, *.html")
    return status


def cancel(
    directory: Directory,
    now: Annotated[
        bool, Option("--now", help="End a running batch job of a chain at once, without saving.")
    ] = False,
) -> int:
    """Request a run to save and stop, from any host, and cancel the pending jobs of its chain.

    The same `hpc-absa run` continues it. Example: `hpc-absa cancel runs/digits`
    """
    from hpc_absa.supervisor.run_state import cancel as cancel_run

    console.never_fail()
    for line in cancel_run(directory, now):
        print_line(line)
    return ExitStatus.OK


def train(
    job: JobFile,
    run_dir: Annotated[
        Path, Option("--run-dir", parser=folder, metavar="D", help="Run directory.")
    ],
    overrides: Overrides = None,
    allow_changed: AllowChanged = None,
) -> None:
    """Train as one rank: horovodrun, mpirun and srun start this command on every rank.

    Example: `mpirun -np 4 hpc-absa train jobs/digits.toml --run-dir runs/digits`

    It works without a supervisor, with any number of ranks: it resumes from the newest good
    checkpoint, trains until the job is done or a decision asks for more ranks, and prints the
    command of the next phase.
    """
    console.never_fail()
    gc.disable()  # until all ranks are connected: imports leave no garbage, and this saves 0.3 s
    from hpc_absa.training import rank

    status = rank.main(job, run_dir, tuple(overrides or ()), tuple(allow_changed or ()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without unloading torch: the next phase would wait 0.8 s for it


def link(
    directory: Directory,
    number: Annotated[int, Argument(metavar="N", min=1, help="Number of the batch job.")],
    allow_changed: AllowChanged = None,
) -> int:
    """Run one batch job of a chain: `hpc-absa run --launcher slurm` submits this command.

    It trains on the job's nodes until the run is done, a decision asks for more ranks, or the time
    limit is near, and submits the next job of the chain.
    """
    from hpc_absa.report.tensorboard import TensorBoardLog
    from hpc_absa.rundir import RunDir
    from hpc_absa.supervisor import run_state
    from hpc_absa.supervisor.link import LinkRun

    console.never_fail()
    run = RunDir(directory)
    board = TensorBoardLog(run)
    lines = console.LineQueue(_show_and_update(board))
    try:
        status = LinkRun(run, number, tuple(allow_changed or ()), lines).work()
    finally:
        lines.close()
    _write_figures(run, board, page=run_state.finished(run) is not None)
    return status
