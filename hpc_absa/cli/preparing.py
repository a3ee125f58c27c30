"""Commands before a run: its plan, its data, and the checks of the installation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from hpc_absa.cli.options import (
    JobFile,
    Json,
    MaxRanks,
    Overrides,
    RunFolder,
    folder,
    print_json,
    print_line,
)
from hpc_absa.console import rich_console
from hpc_absa.data.registry import DATASETS
from hpc_absa.errors import ExitStatus, UsageError

if TYPE_CHECKING:
    from hpc_absa.config import Job

KNOWN_TO_EXIST = [
    (model, "cross_entropy", "sgd")
    for model in ("digits-cnn", "resnet8", "resnet20", "resnet18-cifar", "resnet18")
]
"""Models with their loss and optimizer for which `plan` need not try to build them."""


def plan(
    job: JobFile,
    overrides: Overrides = None,
    max_ranks: MaxRanks = None,
    samples: Annotated[
        int | None, Option(min=1, help="Training samples, for a user-defined data set.")
    ] = None,
    rate: Annotated[
        float | None,
        Option(min=1e-9, help="Samples per second of one rank: adds hours and node-hours."),
    ] = None,
    ranks_per_node: Annotated[int, Option(min=1, help="Ranks on one node, for node-hours.")] = 1,
    as_json: Json = False,
) -> int:
    """Show the phases of a job and its SGD iterations, without training.

    Where measurements decide, the earliest and the latest possible growth are shown. With `--rate`,
    also the hours and node-hours of computing.
    Example: `hpc-absa plan jobs/digits.toml --rate 2000`
    """
    from hpc_absa import config, worldsize
    from hpc_absa import plan as planner

    loaded = config.load(job, tuple(overrides or ()))
    count = samples or planner.training_samples(loaded)
    if loaded.data.name != "script":  # whose model is its own
        _require_buildable(loaded)
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
            plans["plan"].to_dict()
            if "plan" in plans
            else {"steps": None, "phases": None, **{k: p.to_dict() for k, p in plans.items()}}
        )
        return ExitStatus.OK
    for name, planned in plans.items():
        _print_plan(loaded.name if name == "plan" else f"{loaded.name}, {name} growth", planned)
    return ExitStatus.OK


def _require_buildable(job: Job) -> None:
    """Refuse what a rank would refuse, where torch is installed."""
    import importlib.util

    names = job.model.name, job.train.loss, job.train.optimizer
    arguments = job.model.arguments or job.loss.arguments or job.optimizer.arguments
    if names in KNOWN_TO_EXIST and not (arguments or job.train.metrics):
        return  # torch takes two seconds to import
    if importlib.util.find_spec("torch") is not None:
        from hpc_absa.training.named import require_buildable

        require_buildable(job)


def _print_plan(title: str, planned: Any) -> None:
    from rich.table import Table

    table = Table(title=f"{title}: {planned.steps} SGD iterations", title_justify="left")
    timed = any(phase.hours is not None for phase in planned.phases)
    columns = ["epochs", "steps", "global batch", "ranks", "learning rate"]
    for column in columns + ["hours", "node-hours"] * timed:
        table.add_column(column, justify="right")
    for p in planned.phases:
        row = [f"{p.epochs:.2f}", str(p.steps), str(p.global_batch), str(p.ranks), f"{p.lr:.4g}"]
        table.add_row(*row, *([f"{p.hours:.3g}", f"{p.node_hours:.3g}"] if timed else []))
    if timed:
        hours = sum(phase.hours for phase in planned.phases)
        node_hours = sum(phase.node_hours for phase in planned.phases)
        table.caption = f"{hours:.3g} hours of computing, {node_hours:.3g} node-hours"
        table.caption_justify = "left"
    rich_console().print(table)


def data(
    name: Annotated[
        str | None,
        Argument(help=", ".join(DATASETS)),
    ] = None,
    root: Annotated[
        Path | None, Option(parser=folder, metavar="D", help="Folder of the raw data set.")
    ] = None,
    out: Annotated[Path | None, Option(help="Packed file; default ROOT.h5.")] = None,
    image_size: Annotated[
        int | None,
        Option(min=1, help="Resize images to this side in pixels, if their sizes differ."),
    ] = None,
    encoded: Annotated[
        bool,
        Option("--encoded", help="Pack image files as they are; they are decoded in training."),
    ] = False,
    unreadable: Annotated[
        str | None, Option(metavar="stop|skip", help="With --encoded: unreadable files.")
    ] = None,
    show: Annotated[Path | None, Option(help="Only describe this packed file.")] = None,
) -> int:
    """Pack a data set into the one HDF5 file that all ranks read.

    Example: `hpc-absa data cifar10 --root ~/data/cifar10`

    In the job, `data.root` is either the folder or the packed file: the packed file next to a
    folder is used instead of the folder. What was left out of the data set, and why, is printed
    and kept in the file (`notes` of `--show`).
    """
    from hpc_absa.data import prepare
    from hpc_absa.data.sources import decoded

    if show:
        print(json.dumps(prepare.describe(show), indent=2))
        return ExitStatus.OK
    if not name:
        raise UsageError("Missing argument 'NAME', or --show FILE.")
    packed = out or (prepare.packed_beside(root) if root else Path(f"{name}.h5"))
    arguments: dict[str, Any] = {"image_size": image_size} if image_size else {}
    arguments |= {"encoded": True} if encoded else {}
    arguments |= {"unreadable": unreadable} if unreadable else {}
    prepare.pack(name, root, arguments, packed, progress=True)
    print_line(
        f"packed: {decoded(packed)}; in the job: [data] name = {name!r}, root = {str(packed)!r}"
    )
    return ExitStatus.OK


def doctor(
    job: Annotated[
        Path | None, Argument(metavar="JOB", help="Also check what this job file needs.")
    ] = None,
    run_dir: RunFolder = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> int:
    """Check the installation and this machine, and show how to fix what is wrong.

    With a job file, also check what the job needs: hosts, slots, cores, Slurm, and one microbatch
    through its model, loss and data, with the memory that it takes.

    Examples: `hpc-absa doctor` · `hpc-absa doctor jobs/digits.toml`

    With `--json`: `errors` and `warnings`, their numbers, and `findings`, each with `check`,
    `status` (ok, warning or error), `detail` and `fix`. Exit status: 0 no errors, 1 errors;
    warnings do not change it.
    """
    from hpc_absa import config
    from hpc_absa.doctor import run_checks
    from hpc_absa.rundir import RunDir
    from hpc_absa.supervisor.run_state import default_run_dir

    loaded = config.load(job, tuple(overrides or ())) if job else None
    folder = run_dir or (default_run_dir(loaded) if loaded else Path("runs"))
    findings = []
    with rich_console(stderr=True).status("checking") as status:
        for finding in run_checks(RunDir(folder), loaded):
            findings.append(finding)
            status.update(f"checking, after: {finding.check}")
    number = {state: sum(f.status == state for f in findings) for state in ("error", "warning")}
    if as_json:  # `faults` is the former name of `errors`
        errors = number["error"]
        counts = {"errors": errors, "faults": errors, "warnings": number["warning"]}
        print_json({**counts, "findings": [finding.to_dict() for finding in findings]})
        return ExitStatus.FAILED if errors else ExitStatus.OK
    for state, word in (("error", "ERROR"), ("warning", "WARNING"), ("ok", "good")):
        for finding in (f for f in findings if f.status == state):
            print_line(f"{word:7} {finding.check}: {finding.detail}")
            if finding.fix:
                print_line(f"{'':7} fix: {finding.fix}")
    counted = (f"{n or 'no'} {word}{'s' * (n != 1)}" for word, n in number.items())
    print_line(", ".join(counted))
    return ExitStatus.FAILED if number["error"] else ExitStatus.OK
