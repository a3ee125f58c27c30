"""The time and the node-hours of a planned run, predicted from constants of a machine.

Allreduce is a ring: on R ranks 2(R − 1) messages one after the other, and 2(R − 1)/R times the
gradients over each link. `docs/planning.md` has the other formulas, and the error of a prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from statistics import fmean, median

from pydantic import PositiveInt

from hpc_absa.config import Job
from hpc_absa.config.tables import is_adaptive
from hpc_absa.errors import CheckpointError, UsageError
from hpc_absa.plan import Plan, PlannedPhase, with_ranks
from hpc_absa.report.history import History, Phase, job_table, load
from hpc_absa.report.timing import finite
from hpc_absa.rundir import RunDir
from hpc_absa.section import Fraction, NonNegative, Positive, Section


class Machine(Section):
    """A machine, and the job's model on it."""

    samples_per_second: Positive
    """Training samples of one rank, without communication."""
    contention: NonNegative = 0.0
    """How much longer a rank computes for each further rank on its node, as a share."""
    parameters: PositiveInt | None = None
    """Of the model; None: counted."""
    latency: NonNegative = 2e-5
    """Seconds of a message between two ranks."""
    bandwidth: Positive = 1e10
    """Bytes per second between two ranks, in each direction."""
    overlap: Fraction = 0.0
    """Share of a microbatch's computing behind which communication is hidden."""
    adversarial_cost: NonNegative = 1.0
    """Of an adversarial example, in training samples."""
    product_cost: Positive = 3.0
    """Of a sample in a Hessian-vector product, in training samples."""
    products: Positive = 12.0
    """Hessian-vector products of one estimate."""
    evaluation: NonNegative = 0.02
    """Of evaluating after an epoch, as a share of the epoch's computing."""
    save_bandwidth: Positive = 4e8
    """Bytes per second of writing a checkpoint."""
    save_blocking: Fraction = 0.05
    """Share of a save in the background during which training waits."""
    start_seconds: NonNegative = 5.0
    """From a decision, or the start of the run, to the first step on new ranks."""
    start_seconds_per_rank: NonNegative = 0.01
    """The same, for each rank."""
    queue_seconds: NonNegative = 0.0
    """In the queue, before each start."""
    ranks_per_node: PositiveInt = 1
    slots_per_node: PositiveInt | None = None
    """Ranks of a node that compute at full speed at the same time; more share it. None: all."""

    def allreduce(self, ranks: int) -> float:
        """Seconds of the allreduce of the gradients, float32."""
        size = 4 * (self.parameters or 0)
        return 2 * (ranks - 1) * (self.latency + size / ranks / self.bandwidth)

    def rate(self, ranks: int) -> float:
        """Samples per second of each of `ranks`."""
        on_node = min(ranks, self.ranks_per_node)
        busy = min(on_node, self.slots_per_node or on_node)
        return self.samples_per_second / (1 + self.contention * (busy - 1)) * busy / on_node


@dataclass(frozen=True)
class PredictedPhase:
    planned: PlannedPhase
    seconds: Mapping[str, float]
    """By category of `timing.CATEGORIES`, and in the queue."""
    nodes: int

    @property
    def hours(self) -> float:
        return sum(self.seconds.values()) / 3600

    @property
    def node_hours(self) -> float:
        """Without the queue, in which nothing is allocated."""
        return self.nodes * (self.hours - self.seconds.get("queue", 0.0) / 3600)


@dataclass(frozen=True)
class Prediction:
    phases: tuple[PredictedPhase, ...]

    @property
    def hours(self) -> float:
        return sum(phase.hours for phase in self.phases)

    @property
    def node_hours(self) -> float:
        return sum(phase.node_hours for phase in self.phases)

    @property
    def seconds(self) -> dict[str, float]:
        keys = dict.fromkeys(key for phase in self.phases for key in phase.seconds)
        return {key: sum(phase.seconds.get(key, 0.0) for phase in self.phases) for key in keys}


@dataclass(frozen=True)
class World:
    """The run with at most so many ranks."""

    ranks: int
    adaptive: Prediction
    """Each phase on its own ranks and nodes only."""
    fixed: Prediction
    """The same steps, on `ranks` ranks from the start."""


def predict(planned: Plan, job: Job, samples: int, machine: Machine) -> Prediction:
    """The time of each phase; ranks start where their number changes."""
    ranks, phases = 0, []
    for phase in planned.phases:
        seconds = _working(phase, job, samples, machine)
        if phase.ranks != ranks:
            start = machine.start_seconds + machine.start_seconds_per_rank * phase.ranks
            seconds["resize" if ranks else "start"] = start
            seconds["queue"] = machine.queue_seconds
        ranks = phase.ranks
        phases.append(PredictedPhase(phase, seconds, -(-ranks // machine.ranks_per_node)))
    return Prediction(tuple(phases))


def _working(phase: PlannedPhase, job: Job, samples: int, machine: Machine) -> dict[str, float]:
    ranks, b = phase.ranks, job.train.microbatch
    rate, allreduce = machine.rate(ranks), machine.allreduce(ranks)
    rounds, share = -(-(phase.global_batch // b) // ranks), -(-job.hessian.samples // ranks)
    comp = phase.steps * rounds * b / rate
    product = machine.product_cost * share / rate + allreduce
    seconds = {
        "comp": comp,
        "adversarial": comp * phase.adversarial * machine.adversarial_cost,
        "comm": phase.steps * max(0.0, allreduce - machine.overlap * b / rate),
        "hessian": phase.estimates * machine.products * product,
        "eval": phase.epochs * machine.evaluation * samples / rate / ranks,
    }
    moments = 2 if is_adaptive(job.train.optimizer) else 1
    save = 4 * (machine.parameters or 0) * (1 + moments) / machine.save_bandwidth
    saves = sum(seconds.values()) // job.checkpoint.every_seconds
    seconds["checkpoint"] = save * (1 + saves * machine.save_blocking)
    return seconds


def worlds(planned: Plan, job: Job, samples: int, machine: Machine, limit: int) -> list[World]:
    """The run with 1, 2, 4, … times `ranks.initial` and at last `limit` ranks, where it differs."""
    sizes = [job.ranks.initial << i for i in range(limit.bit_length())]
    result: list[World] = []
    for size in [*(size for size in sizes if size < limit), limit]:
        adaptive = with_ranks(job, planned, size)
        ranks = adaptive.phases[-1].ranks
        if result and ranks == result[-1].ranks:
            continue
        same = tuple(replace(phase, ranks=ranks) for phase in adaptive.phases)
        runs = [predict(each, job, samples, machine) for each in (adaptive, Plan(0, same))]
        result.append(World(ranks, *runs))
    return result


def fastest(all_worlds: Sequence[World]) -> World:
    """The smallest of the fastest adaptive worlds: more ranks do not shorten the run."""
    return min(all_worlds, key=lambda world: world.adaptive.hours)


def cheaper(all_worlds: Sequence[World]) -> list[int]:
    """The numbers of ranks at which an adaptive world needs fewer node-hours than a fixed one."""
    return [w.ranks for w in all_worlds if w.adaptive.node_hours < w.fixed.node_hours]


def measured(path: Path, job: Job, parameters: int) -> dict[str, float]:
    """The keys of `Machine` that a run of the job's model shows.

    Args:
        path: its run directory.
        job: the job to predict, which has the same model and microbatch.
        parameters: of the model.

    Raises:
        UsageError: not a run directory, of another model, or without a phase that ended normally.
    """
    history = load(path)
    _require_same_model(path, history, job)
    phases = [
        phase
        for phase in history.phases
        if phase.attempts == 1 and phase.outcome in ("done", "resize", "in_place", "stopped")
        if _samples(phase) > 0 and phase.seconds.get("comp", 0.0) > 0
    ]
    if not phases:
        raise UsageError(f"{path}: no phase of it ended normally, expected one with its times")
    on_node = [max(1.0, phase.ranks / max(1, len(phase.hosts))) for phase in phases]
    further, per_sample = _fit(
        [
            ((n - 1) * _samples(phase), _samples(phase), _rank_seconds(phase, *COMPUTING))
            for n, phase in zip(on_node, phases, strict=True)
        ],
        Machine.model_fields["contention"].default,
    )
    per_sample = per_sample or fmean(_rank_seconds(p, *COMPUTING) / _samples(p) for p in phases)
    shown = Machine(
        samples_per_second=1 / per_sample,
        contention=further / per_sample,
        ranks_per_node=round(max(on_node)),
    )
    values: dict[str, float] = shown.model_dump(include=shown.model_fields_set)
    work = sum(_samples(phase) / shown.rate(int(phase.ranks)) for phase in phases)
    values["evaluation"] = sum(_rank_seconds(phase, "eval") for phase in phases) / work

    ratio, first = finite(job_table(history.job, "schedule").get("ratio"), 0.0), phases[0]
    if ratio and first.number == 1 and first.epoch_end <= history.epochs_wanted / 2:
        adversarial = _rank_seconds(first, "adversarial") / _rank_seconds(first, "comp")
        values["adversarial_cost"] = adversarial / ratio
    steps = [
        (2 * (R - 1) * n, 8 * (R - 1) / R * parameters * n, _rank_seconds(phase, "comm") / R)
        for phase in phases
        if (R := phase.ranks) > 1 and (n := phase.step_end - phase.step_begin)
        # otherwise some ranks wait for others there
        if phase.global_batch / job.train.microbatch % R == 0
    ]
    if steps:
        latency, per_byte = _fit(steps, Machine.model_fields["latency"].default)
        values |= {"latency": latency, "bandwidth": 1 / max(per_byte, 1e-15)}
    starts = [
        (phase.ranks, 1.0, _rank_seconds(phase, *STARTING) / phase.ranks)
        for phase in phases
        if _rank_seconds(phase, "start", "resize")
    ]
    if starts:
        per_rank = Machine.model_fields["start_seconds_per_rank"].default
        values["start_seconds_per_rank"], values["start_seconds"] = _fit(starts, per_rank)
    return values | _of_events(history, shown)


def saved_parameters(path: Path) -> int | None:
    """Parameters in the newest good checkpoint of the run in `path`; None without one.

    Those with a state of the optimizer; without any, all tensors but statistics of batch norm.
    """
    from hpc_absa.checkpoint import file  # h5py and numpy: only for models of the user's own

    for checkpoint in reversed(RunDir(path).checkpoint_files()):
        try:
            whole = file.verify(checkpoint)
            parts = [whole, *(file.verify(checkpoint.with_name(name)) for name in whole.shards)]
        except CheckpointError:
            continue
        places = {key: place for part in parts for key, place in part.places.items()}
        sizes = {
            name: prod(place.shape)
            for (group, name), place in places.items()
            if group == "model" and not name.endswith((".running_mean", ".running_var"))
            if place.dtype[1:] in ("f4", "f8", "f2", "u2")  # u2: the bits of bfloat16
        }
        trained = {name.partition(".")[2] for group, name in places if group == "optimizer"}
        return sum(sizes[name] for name in trained & sizes.keys() or sizes) or None
    return None


def _of_events(history: History, shown: Machine) -> dict[str, float]:
    """Constants from `decision` and `checkpoint` events and from times in the queue."""
    values = {}
    numbers = ("matvecs", "seconds", "hessian_samples", "ranks")
    decisions = (event for event in history.kept if event["event"] == "decision")
    estimates = [[finite(event.get(key), 0.0) for key in numbers] for event in decisions]
    if estimates := [each for each in estimates if min(each) > 0]:
        values["products"] = fmean(matvecs for matvecs, *_ in estimates)
        passes = sum(n * samples / R / shown.rate(int(R)) for n, _, samples, R in estimates)
        values["product_cost"] = sum(seconds for _, seconds, *_ in estimates) / passes
    speeds = [
        finite(event.get("bytes"), 0.0) / seconds
        for event in history.kept
        if event["event"] == "checkpoint" and (seconds := finite(event.get("seconds"), 0.0)) > 0
    ]
    if speeds and median(speeds) > 0:
        values["save_bandwidth"] = median(speeds)
    waits = [phase.queued / phase.ranks for phase in history.cost.phases if phase.queued]
    return values | ({"queue_seconds": fmean(waits)} if waits else {})


def _require_same_model(path: Path, history: History, job: Job) -> None:
    same = [("model", "name", job.model.name), ("train", "microbatch", job.train.microbatch)]
    for table, key, here in same:
        there = job_table(history.job, table).get(key)
        if there != here:
            raise UsageError(
                f"{path}: {table}.{key} = {there!r} there, {here!r} here: expected a run of the "
                "same model and microbatch"
            )


COMPUTING = ("comp", "data")
STARTING = ("start", "resize", "rehearsal", "other")


def _samples(phase: Phase) -> float:
    return (phase.step_end - phase.step_begin) * phase.global_batch


def _rank_seconds(phase: Phase, *keys: str) -> float:
    return phase.ranks * sum(phase.seconds.get(key, 0.0) for key in keys)


def _fit(rows: Sequence[tuple[float, float, float]], otherwise: float) -> tuple[float, float]:
    """a, b ≥ 0 of y = a·u + b·v by least squares; a is `otherwise` where all u/v are the same."""
    uu, uv, vv = (sum(r[i] * r[j] for r in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    uy, vy = (sum(r[i] * r[2] for r in rows) for i in (0, 1))
    determinant = uu * vv - uv * uv
    if determinant <= 1e-9 * uu * vv:
        a = min(otherwise, uy / uu) if uu else otherwise
        return a, max(0.0, (vy - a * uv) / vv)
    a, b = (uy * vv - vy * uv) / determinant, (vy * uu - uy * uv) / determinant
    if a < 0:
        return 0.0, vy / vv
    return (uy / uu, 0.0) if b < 0 else (a, b)
