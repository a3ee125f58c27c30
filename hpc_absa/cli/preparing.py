"""Commands before a run: what it will do, its data, its surroundings."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from hpc_absa.cli.common import JobFile, Json, MaxRanks, Overrides, RunFolder, print_json, say
from hpc_absa.errors import ExitStatus, UsageError


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
    from hpc_absa import config, worldsize
    from hpc_absa import plan as planner

    loaded = config.load(job, (*(overrides or ()),))
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
        print_json(
            plans["course"].to_dict()
            if "course" in plans
            else {"steps": None, "phases": None, **{k: p.to_dict() for k, p in plans.items()}}
        )
        return ExitStatus.OK
    for name, planned in plans.items():
        _print_plan(loaded.name if name == "course" else f"{loaded.name}, {name} course", planned)
    return ExitStatus.OK


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
    packed = out or (prepare.packed_beside(root) if root else Path(f"{name}.h5"))
    arguments = {"image_size": image_size} if image_size else {}
    prepare.pack(name, root, arguments, packed, progress=True)
    say(f"packed: {packed}; in the job: [data] name = {name!r}, root = {str(packed)!r}")
    return ExitStatus.OK


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
    from hpc_absa import config
    from hpc_absa.doctor import Patient, examine
    from hpc_absa.rundir import RunDir
    from hpc_absa.supervisor import driver

    loaded = config.load(job, tuple(overrides or ())) if job else None
    folder = run_dir or (driver.default_run_dir(loaded) if loaded else Path("runs"))
    findings = []
    for finding in examine(Patient(RunDir(folder), loaded)):
        findings.append(finding)
        if not as_json:
            say(f"{finding.state.upper():9} {finding.check}: {finding.found}")
            if finding.cure:
                say(f"{'':9} mend it: {finding.cure}")
    faults = sum(finding.state == "fault" for finding in findings)
    if as_json:
        print_json({"faults": faults, "findings": [asdict(finding) for finding in findings]})
    else:
        say(f"{faults or 'no'} fault{'s' * (faults != 1)}")
    return ExitStatus.FAILED if faults else ExitStatus.OK
