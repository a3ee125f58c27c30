"""The commands. Heavy imports stand inside each, so that `status` and errors answer in a blink."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from hpc_absa import __version__
from hpc_absa.errors import ExitStatus, HpcAbsaError, UsageError

app = typer.Typer(
    name="hpc-absa",
    help="Train with Horovod over MPI: start small, watch the Hessian, grow batch and ranks.",
    epilog="Begin with: hpc-absa run jobs/digits.toml",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

JobFile = Annotated[
    Path, typer.Argument(metavar="JOB", help="Job file (TOML); jobs/ has examples.")
]
RunFolder = Annotated[
    Path | None, typer.Option("--run-dir", help="Folder of the run; default runs/<job name>.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key, e.g. --set train.epochs=3; repeatable."
    ),
]
AllowChanged = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY", help="Go on though this key differs from the run begun; repeatable."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
MaxRanks = Annotated[
    int | None,
    typer.Option(min=1, help="Largest number of ranks, in place of the job's ranks.max."),
]


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"hpc-absa {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(ExitStatus.USAGE)


@app.command()
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
    from hpc_absa import job as jobs
    from hpc_absa import worldsize
    from hpc_absa.report.tensorboard import TensorBoardLog
    from hpc_absa.rundir import RunDir
    from hpc_absa.supervisor import driver

    extra = [f"launch.launcher={launcher}"] if launcher else []
    extra += [f"ranks.max={max_ranks}"] if max_ranks else []
    extra += [f"launch.hosts={hosts}"] if hosts else []
    extra += [f"launch.hostfile={hostfile}"] if hostfile else []
    loaded = jobs.load(job, (*(overrides or ()), *extra))
    folder = RunDir(run_dir or driver.default_run_dir(loaded))
    if loaded.launch.launcher == "slurm":
        return _run_chain(loaded, folder, tuple(allow_changed or ()), fresh, dry_run)
    resolved = {"ranks": loaded.ranks.model_copy(update={"max": worldsize.limit(loaded)})}
    loaded = loaded.model_copy(update=resolved)
    board = TensorBoardLog(folder)

    def show(line: str) -> None:
        _show(line)
        with contextlib.suppress(OSError):  # figures may wait, the run may not
            board.update()

    supervisor = driver.Supervisor(loaded, folder, tuple(allow_changed or ()), show)
    if dry_run:
        print(supervisor.launch_command())
        return ExitStatus.OK
    if fresh:
        driver.clear(folder)
    if _already_done(folder):
        return ExitStatus.OK
    status = supervisor.supervise()
    board.close()
    # Whoever is asked to stop may have seconds: the report waits for the end, or `hpc-absa report`.
    if folder.events.exists() and status != ExitStatus.STOPPED:
        _write_report([folder.path], None)
    return status


def _run_chain(job: Any, run: Any, allowed: tuple[str, ...], fresh: bool, dry_run: bool) -> int:
    from hpc_absa.supervisor import driver, follow

    follower = follow.Follower(job, run, allowed, _show)
    if dry_run:
        print(follower.dry(), end="")
        return ExitStatus.OK
    if fresh:
        follower.refuse_if_at_work()
        driver.clear(run)
    return ExitStatus.OK if _already_done(run) else follower.follow()


def _already_done(run: Any) -> bool:
    from hpc_absa.supervisor import driver

    if done := driver.finished(run):
        _show(
            f"{run.path}: already done after {done['steps']} steps; "
            "--fresh begins anew, --run-dir names another place"
        )
    return done is not None


@app.command()
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

    def show(line: str) -> None:
        _show(line)
        with contextlib.suppress(OSError):  # figures may wait, the run may not
            board.update()

    status = LinkRun(run, number, tuple(allow_changed or ()), show).work()
    board.close()
    if driver.finished(run):
        _write_report([run.path], None)
    return status


@app.command()
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
        _show(line)
    return ExitStatus.OK


@app.command()
def train(
    job: JobFile,
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Folder of the run.")],
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


@app.command()
def plan(
    job: JobFile,
    overrides: Overrides = None,
    max_ranks: MaxRanks = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Training samples, where the data set is your own.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=1e-9, help="Samples a second of one rank: adds hours and node-hours."),
    ] = None,
    ranks_per_node: Annotated[
        int, typer.Option(min=1, help="Ranks that share a node, for node-hours.")
    ] = 1,
    as_json: Json = False,
) -> int:
    """Show the phases a job goes through and its SGD iterations, without training.

    Where measurements decide, the earliest and the latest possible course are shown. With `--rate`
    also the hours that the steps take to compute, and node-hours.
    """
    from hpc_absa import job as jobs
    from hpc_absa import plan as planner
    from hpc_absa import worldsize

    loaded = jobs.load(job, (*(overrides or ()),))
    count = samples or planner.training_samples(loaded)
    limit = (
        max_ranks or loaded.ranks.max or loaded.schedule.largest_batch // loaded.train.microbatch
    )
    if loaded.launch.hosts and not max_ranks:
        limit = worldsize.limit(loaded)
    plans = planner.plan(loaded, count, limit)
    if rate:
        b = loaded.train.microbatch
        plans = {k: planner.timed(p, b, rate, ranks_per_node) for k, p in plans.items()}
    if as_json:
        _print_json(
            plans["course"].to_dict()
            if "course" in plans
            else {"steps": None, "phases": None, **{k: p.to_dict() for k, p in plans.items()}}
        )
        return ExitStatus.OK
    for name, planned in plans.items():
        _print_plan(loaded.name if name == "course" else f"{loaded.name}, {name} course", planned)
    return ExitStatus.OK


@app.command()
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


@app.command()
def status(
    directory: Annotated[Path, typer.Argument(metavar="D", help="Run directory.")],
    as_json: Json = False,
) -> int:
    """Say where a run stands, from its files alone: while it runs, after its end, after a crash."""
    from hpc_absa.status import status as of

    found = of(directory)
    if as_json:
        _print_json(found.to_dict())
    else:
        from rich.console import Console

        found.render(Console())
    return ExitStatus.OK


@app.command()
def doctor(
    job: Annotated[
        Path | None, typer.Argument(metavar="[JOB]", help="Job file that is to run here.")
    ] = None,
    run_dir: RunFolder = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> int:
    """Say what the installation can do, and what is wrong, each with its cure.

    With a job file also whether that job finds here what it needs: hosts, slots, cores, Slurm.
    Exit status: 0 nothing is wrong, 1 something is.
    """
    from hpc_absa import job as jobs
    from hpc_absa.doctor import Patient, examine
    from hpc_absa.rundir import RunDir
    from hpc_absa.supervisor import driver

    loaded = jobs.load(job, tuple(overrides or ())) if job else None
    folder = run_dir or (driver.default_run_dir(loaded) if loaded else Path("runs"))
    findings = []
    for finding in examine(Patient(RunDir(folder), loaded)):
        findings.append(finding)
        if not as_json:
            _show(f"{finding.state.upper():9} {finding.check}: {finding.found}")
            if finding.cure:
                _show(f"{'':9} mend it: {finding.cure}")
    faults = sum(finding.state == "fault" for finding in findings)
    if as_json:
        _print_json({"faults": faults, "findings": [asdict(finding) for finding in findings]})
    else:
        _show(f"{faults or 'no'} fault{'s' * (faults != 1)}")
    return ExitStatus.FAILED if faults else ExitStatus.OK


@app.command()
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
        _print_json({**own.to_dict(), "other": other.to_dict() if other else None})
    else:
        from rich.console import Console

        for course in filter(None, (own, other)):
            replaying.render(course, Console())
    return ExitStatus.FAILED if own.differing else ExitStatus.OK


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or a run directory with several.")],
    as_json: Json = False,
) -> int:
    """Check checkpoints against their digests: exit 0 good, 1 damaged, 2 not a checkpoint."""
    from hpc_absa.checkpoint import verification

    results = verification.verify(path)
    if as_json:
        _print_json({"checkpoints": [r.to_dict() for r in results]})
    else:
        for result in results:
            print(f"{result.path}: {result.error or 'good'}")
    return max(result.exit_status for result in results)


@app.command()
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


@app.command()
def data(
    name: Annotated[
        str | None,
        typer.Argument(help="digits, imagefolder, cifar10, cifar100, svhn, tinyimagenet, imagenet"),
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of the raw data set.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Packed file; default ROOT.h5, beside the folder.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels to resize pictures to, where they differ.")
    ] = None,
    show: Annotated[
        Path | None, typer.Option(help="Describe a packed file instead of making one.")
    ] = None,
) -> int:
    """Pack a data set into the one HDF5 file that all ranks read.

    For example `hpc-absa data cifar10 --root ~/data/cifar10`

    Give `data.root` in the job either the folder or the packed file: a folder with its packed
    file beside it is not read again.
    """
    from hpc_absa.data import prepare

    if show:
        print(json.dumps(prepare.describe(show), indent=2))
        return ExitStatus.OK
    if not name:
        raise UsageError("Missing argument 'NAME', or --show FILE.")
    packed = out or Path(f"{root or name}.h5")
    arguments = {"image_size": image_size} if image_size else {}
    prepare.pack(name, root, arguments, packed, progress=True)
    _show(f"packed: {packed}; in the job: [data] name = {name!r}, root = {str(packed)!r}")
    return ExitStatus.OK


@app.command()
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
    _write_report(directories, out)
    return ExitStatus.OK


def _write_report(directories: list[Path], out: Path | None) -> None:
    from hpc_absa.report.page import write_report

    paths = write_report(directories, out)
    _show(f"report: {paths.html} and {paths.png}")


def _print_plan(title: str, planned: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{title}: {planned.steps} SGD iterations", title_justify="left")
    timed = any(phase.hours is not None for phase in planned.phases)
    columns = ["epochs", "steps", "global batch", "ranks", "learning rate"]
    for column in columns + ["hours", "node-hours"] * timed:
        table.add_column(column, justify="right")
    for phase in planned.phases:
        table.add_row(
            f"{phase.epochs:.2f}",
            str(phase.steps),
            str(phase.global_batch),
            str(phase.ranks),
            f"{phase.lr:.4g}",
            *([f"{phase.hours:.3g}", f"{phase.node_hours:.3g}"] if timed else []),
        )
    if timed:
        hours, node_hours = (
            sum(getattr(phase, name) for phase in planned.phases)
            for name in ("hours", "node_hours")
        )
        table.caption = f"{hours:.3g} hours of computing, {node_hours:.3g} node-hours"
        table.caption_justify = "left"
    Console().print(table)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, allow_nan=False))


def _show(line: str) -> None:
    print(line, flush=True)


_ClickError: Any = typer.BadParameter.__mro__[2]
"""Base of usage errors, from click or, in newer releases of Typer, from its own copy of click."""


def main() -> None:
    """The console script: turns every error of a user's into one line and its exit status."""
    try:
        status = app(standalone_mode=False)
    except HpcAbsaError as error:
        print(f"hpc-absa: {error}", file=sys.stderr)
        status = error.status
    except _ClickError as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context else ""
        print(f"hpc-absa: {error.format_message()}{hint}", file=sys.stderr)
        status = error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        status = ExitStatus.STOPPED
    except BrokenPipeError:
        sys.stderr.close()
        status = ExitStatus.FAILED
    except OSError as error:  # a disk that is full, read-only or gone
        print(f"hpc-absa: {error}", file=sys.stderr)
        status = ExitStatus.FAILED
    sys.exit(int(status or 0))
