"""`hpc-absa plan`: the phases of a job, and on request their predicted time."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from hpc_absa.cli.options import JobFile, Json, MaxRanks, Overrides, folder, print_json
from hpc_absa.console import rich_console
from hpc_absa.errors import ExitStatus, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from hpc_absa.config import Job
    from hpc_absa.plan import Plan
    from hpc_absa.scale import Machine, PredictedPhase, Prediction, World

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
    scale: Annotated[
        bool, Option("--scale", help="Also predict hours and node-hours, by phase and by ranks.")
    ] = False,
    rate: Annotated[
        float | None, Option(min=1e-9, help="For --scale: samples per second of one rank.")
    ] = None,
    ranks_per_node: Annotated[
        int | None, Option(min=1, help="For --scale: ranks on one node.")
    ] = None,
    machine: Annotated[
        Path | None, Option(metavar="FILE", help="For --scale: constants of the machine (TOML).")
    ] = None,
    source: Annotated[
        Path | None,
        Option("--from", parser=folder, metavar="D", help="For --scale: measure them in this run."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Show the phases of a job and its SGD iterations, without training.

    Where measurements decide, the earliest and the latest possible growth are shown.
    Example: `hpc-absa plan jobs/digits.toml --scale --rate 2000`
    """
    from hpc_absa import config, worldsize
    from hpc_absa import plan as planner

    loaded = config.load(job, tuple(overrides or ()))
    count = planner.training_samples(loaded, samples)
    if not _known_to_exist(loaded):
        _build(loaded)
    limit = (
        max_ranks or loaded.ranks.max or loaded.schedule.largest_batch // loaded.train.microbatch
    )
    if not max_ranks and (slots := sum(count for _, count in worldsize.stated_hosts(loaded))):
        limit = min(loaded.ranks.max or slots, slots)
    plans = planner.plan(loaded, count, limit)
    output: dict[str, Any] = {name: planned.to_dict() for name, planned in plans.items()}
    if predicts := scale or rate or ranks_per_node or machine or source:
        from hpc_absa import scale as model

        given = {"samples_per_second": rate, "ranks_per_node": ranks_per_node}
        constants, origins = _machine(loaded, source, machine, given)
        worlds = {k: model.worlds(p, loaded, count, constants, limit) for k, p in plans.items()}
        output = {name: output[name] | _to_dict(worlds[name]) for name in plans}
    if as_json:
        whole = output.pop("plan", {"steps": None, "phases": None}) | output
        print_json(whole | ({"machine": constants.model_dump()} if predicts else {}))
        return ExitStatus.OK
    for name, planned in plans.items():
        title = loaded.name if name == "plan" else f"{loaded.name}, {name} growth"
        title += f": {planned.steps} SGD iterations"
        if predicts:
            _print_worlds(title, worlds[name])
        else:
            _print_plan(title, planned)
    if predicts:
        for origin, keys in origins.items():
            known = {key: getattr(constants, key) for key in keys}
            words = ", ".join(f"{k} {v:.4g}" for k, v in known.items() if v is not None)
            rich_console().print(f"Constants {origin}: {words}", highlight=False)
    return ExitStatus.OK


def _known_to_exist(job: Job) -> bool:
    names = job.model.name, job.train.loss, job.train.optimizer
    arguments = job.model.arguments or job.loss.arguments or job.optimizer.arguments
    return names in KNOWN_TO_EXIST and not (arguments or job.train.metrics)


def _build(job: Job) -> int | None:
    """Refuse what a rank would refuse, where torch is installed; the parameters of the model."""
    if job.data.name == "script" or importlib.util.find_spec("torch") is None:
        return None  # a script's model is its own
    from hpc_absa.training.named import require_buildable  # torch takes two seconds to import

    return require_buildable(job)


def _machine(
    job: Job,
    source: Path | None,
    file: Path | None,
    options: Mapping[str, float | None],
) -> tuple[Machine, dict[str, list[str]]]:
    """The constants, and which of them are from where; options go before the file, then the run."""
    from hpc_absa import config
    from hpc_absa.scale import Machine, measured, saved_parameters

    stated = config.read(file, "a machine file") if file else {}
    options = {key: value for key, value in options.items() if value is not None}
    config.validate(Machine, {"samples_per_second": 1.0} | stated, str(file))
    if not (source or "samples_per_second" in stated | options):
        raise UsageError(
            "--scale: the speed of a rank is not known; give --rate N, a file with "
            "samples_per_second for --machine, or a run for --from"
        )
    parameters = stated.get("parameters") or _build(job)
    if parameters is None and source:
        parameters = saved_parameters(source)
    if parameters is None:
        raise UsageError(
            f"model.name = {job.model.name!r}: its parameters cannot be counted here; state "
            "parameters = N in a file for --machine, or give a run with a checkpoint for --from"
        )
    known = {"parameters": parameters}
    shown = measured(source, job, parameters) if source else {}
    constants = shown | stated | options | known
    machine = config.validate(Machine, constants, str(source or file or "--scale"))
    origins: dict[str, list[str]] = {}
    for key in Machine.model_fields:
        where = [
            f"measured in {source}" if key in shown else "",
            f"from {file}" if key in stated else "",
            "from the options" if key in options else "",
        ]
        origin = next(filter(None, reversed(where)), "counted" if key in known else "by default")
        origins.setdefault(origin, []).append(key)
    return machine, origins


def _to_dict(worlds: Sequence[World]) -> dict[str, Any]:
    """For JSON: the phases and the cost of the largest world, and the cost of all."""
    from hpc_absa.scale import cheaper, fastest

    def cost(run: Prediction | PredictedPhase) -> dict[str, Any]:
        return {"hours": run.hours, "node_hours": run.node_hours, "seconds": dict(run.seconds)}

    largest = worlds[-1].adaptive
    return {
        "phases": [asdict(each.planned) | cost(each) for each in largest.phases],
        **cost(largest),
        "worlds": [
            {"ranks": each.ranks, "adaptive": cost(each.adaptive), "fixed": cost(each.fixed)}
            for each in worlds
        ],
        "fastest_ranks": fastest(worlds).ranks,
        "adaptive_cheaper_at": cheaper(worlds),
    }


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _print_plan(title: str, planned: Plan) -> None:
    table = _table(title, "epochs", "steps", "global batch", "ranks", "learning rate")
    for p in planned.phases:
        row = (f"{p.epochs:.2f}", p.steps, p.global_batch, p.ranks, f"{p.lr:.4g}")
        table.add_row(*map(str, row))
    rich_console().print(table)


def _print_worlds(title: str, worlds: Sequence[World]) -> None:
    from rich.box import SIMPLE_HEAD

    from hpc_absa.report.format import duration, number
    from hpc_absa.scale import cheaper, fastest

    heads = ("epochs", "steps", "batch", "ranks", "hours", "node-hours", *SHARES)
    table = _table(title, *heads)
    table.box, table.padding, table.pad_edge = SIMPLE_HEAD, (0, 1, 0, 0), False
    largest = worlds[-1].adaptive
    for phase in largest.phases:
        p = phase.planned
        row = (f"{p.epochs:.2f}", p.steps, p.global_batch, p.ranks)
        table.add_row(*map(str, row), *_costs(phase))
    table.add_section()
    table.add_row("all", "", "", "", *_costs(largest))
    console = rich_console()
    console.print(table, highlight=False)
    if len(worlds) == 1:
        return
    heads = ("ranks", "adaptive", "node-hours", "fixed", "node-hours", "gain")
    ladder = _table("By the largest number of ranks", *heads)
    before = math.inf
    for world in worlds:
        cells = [str(world.ranks)]
        for run in (world.adaptive, world.fixed):
            cells += [duration(run.hours * 3600), number(run.node_hours, 3)]
        gain = (before - world.adaptive.hours) * 3600
        ladder.add_row(*cells, "none" if gain <= 0 else duration(gain))
        before = world.adaptive.hours
    best, saving = fastest(worlds).ranks, ", ".join(map(str, cheaper(worlds)))
    sentences = [
        f"More ranks than {best} do not shorten the run."
        if best < worlds[-1].ranks
        else f"More ranks shorten the run up to the {best} that it can use.",
        f"Adaptive runs need fewer node-hours than fixed ones on {saving} ranks."
        if saving
        else "No adaptive run needs fewer node-hours than a fixed one.",
    ]
    console.print(ladder, *sentences, sep="\n", highlight=False)


SHARES = {
    "comm %": ("comm",),
    "λ %": ("hessian",),
    "start %": ("start", "resize", "queue"),
    "other %": ("adversarial", "eval", "checkpoint"),
}
"""Columns beside computing, and the categories that each one sums."""


def _costs(run: Prediction | PredictedPhase) -> list[str]:
    from hpc_absa.report.format import number

    shares = (sum(run.seconds.get(key, 0.0) for key in keys) for keys in SHARES.values())
    percent = (f"{share / run.hours / 36:.2g}" for share in shares)
    return [number(run.hours, 3), number(run.node_hours, 3), *percent]
