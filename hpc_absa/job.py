"""The job file: frozen pydantic models, unknown keys refused, every field with unit and origin.

Origins named below: *talk* is the ABSA talk and arXiv:1810.01021, *Goyal* arXiv:1706.02677, *Smith*
arXiv:1711.00489, *ours* a choice of this project, with its reason.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from hpc_absa.errors import UsageError

WITHOUT_EFFECT = (
    "name",
    "data.root",
    "ranks",
    "checkpoint",
    "launch",
    "train.device",
    "train.threads_per_rank",
)
"""Parts of a job that do not change its result, beyond the order of summation."""

Fraction = Annotated[float, Field(ge=0, le=1)]
_HOST = re.compile(r"[^\s:,]+(:0*[1-9][0-9]*)?")
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A table of the job file."""

    # Strict: `true` is no number and "3" no integer, whatever Python could make of them.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


class Named(BaseModel):
    """A table that names a thing and passes its other keys on as that thing's own arguments."""

    model_config = ConfigDict(
        frozen=True, extra="allow", strict=True, use_attribute_docstrings=True
    )

    name: str
    """A built-in one's name, or `package.module:function`."""

    @property
    def arguments(self) -> dict[str, Any]:
        """The keys beyond this table's own fields."""
        return dict(self.model_extra or {})


class Data(Named):
    """The data set. Other keys go to a `package.module:function` as its arguments."""

    root: str = ""
    """Folder of the data set, or its packed HDF5 file; empty for data that needs none (digits)."""
    padding: Count | None = None
    """Pixels of zero padding before the random crop; None takes an eighth of the image, 4 of 32 as
    in He et al. 2016, and none for the 8×8 digits."""
    flip: bool | None = None
    """Random horizontal flips; None means yes, except for digits, which have a direction."""


class Model(Named):
    """The network. Other keys are the model's own arguments (`depth`, `widen`, `width`, ...)."""


class Train(Section):
    """How one step is taken and how many samples are visited."""

    epochs: PositiveInt
    """Passes over the training set."""
    microbatch: PositiveInt
    """Samples of one forward and backward pass on one rank; batch-norm statistics are over it."""
    lr: Positive
    """Learning rate at the base batch."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD momentum (talk)."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """L2 penalty added to the gradient (the talk names none; 5e-4 is common for CIFAR)."""
    milestones: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = ()
    """Epochs after which the learning rate is decayed (GG: after which the batch grows)."""
    lr_decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Factor ρ at each milestone (talk, CIFAR-10)."""
    remainder: Literal["carry", "drop"] = "carry"
    """What becomes of the samples that do not fill an epoch's last microbatch (`absa.md`)."""
    loss: str = "cross_entropy"
    """`cross_entropy`, or `package.module:function` of (outputs, targets) returning the mean."""
    threads_per_rank: PositiveInt | None = None
    """CPU threads of one rank; None divides the cores of a host among its ranks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes one GPU a rank where there are GPUs."""
    reproducible: bool = False
    """The same weights bit for bit at any power-of-two world size; costs speed."""

    @model_validator(mode="after")
    def _milestones_rise(self) -> Train:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones = {list(self.milestones)}: expected rising epochs")
        return self


class _Schedule(Section):
    """What all schedules have."""

    base_batch: PositiveInt
    """Global batch B0 for which `train.lr` was chosen; adaptive schedules start there. Samples."""
    max_batch: PositiveInt | None = None
    """Largest global batch, which BL and FB use throughout. Samples; None means `base_batch`."""

    @property
    def largest_batch(self) -> int:
        """`max_batch` with its default filled in."""
        return self.max_batch or self.base_batch

    @model_validator(mode="after")
    def _room_to_grow(self) -> _Schedule:
        if self.largest_batch < self.base_batch:
            raise ValueError(
                f"max_batch = {self.max_batch}: expected at least base_batch = {self.base_batch}"
            )
        return self


class Baseline(_Schedule):
    """BL: constant batch, learning rate as given, decayed at milestones."""

    method: Literal["bl"]
    """`bl`."""


class FacebookRule(_Schedule):
    """FB: constant batch, learning rate scaled with it after a warm-up (Goyal)."""

    method: Literal["fb"]
    """`fb`."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 5
    """Epochs of linear warm-up from `lr` to `lr · B/B0` (Goyal, section 2.2)."""


class GoogleRule(_Schedule):
    """GG: the batch grows by 1/ρ at each milestone instead of the learning rate's decay (Smith)."""

    method: Literal["gg"]
    """`gg`."""


class AdaptiveBatch(_Schedule):
    """ABS: the batch grows when the top Hessian eigenvalue has fallen."""

    method: Literal["abs"]
    """`abs`."""
    alpha: Annotated[float, Field(gt=1)] = 2.0
    """Growth needs an eigenvalue at most `reference / alpha` (talk)."""
    beta: Annotated[int, Field(ge=2)] = 2
    """Factor by which batch and learning rate grow (talk)."""
    kappa: PositiveInt = 10
    """Decision points without growth after which the batch grows all the same (talk)."""


class AdversarialAdaptiveBatch(AdaptiveBatch):
    """ABSA: ABS with adversarial examples in every microbatch."""

    method: Literal["absa"]  # type: ignore[assignment]
    """`absa`."""
    ratio: Fraction = 0.2
    """Fraction r of a microbatch that becomes adversarial (talk)."""
    epsilon: Positive = 0.005
    """Step of the fast gradient sign method; pixel units, inputs in [0, 1] (talk)."""
    omega: Annotated[float, Field(ge=1)] = 2.0
    """Divisor of `ratio` at each growth (talk)."""


Schedule = Annotated[
    Baseline | FacebookRule | GoogleRule | AdaptiveBatch | AdversarialAdaptiveBatch,
    Field(discriminator="method"),
]


class Hessian(Section):
    """How the top eigenvalue is estimated at a decision point."""

    method: Literal["lanczos", "power"] = "lanczos"
    """Lanczos needs about half the products of power iteration (`docs/curvature.md`)."""
    samples: PositiveInt = 512
    """Training samples the Hessian is averaged over; at 128 λ scatters by 10–15 % (ours)."""
    tol: Annotated[float, Field(gt=0, lt=1)] = 1e-2
    """Estimated relative error at which an estimate has converged (talk). Less buys nothing for
    decisions: λ scatters by more from sample to sample (`docs/curvature.md`)."""
    max_iter: PositiveInt = 10
    """Matvecs after which an estimate gives up, unconverged (talk)."""
    every: PositiveInt | None = None
    """Samples between decision points; None means once an epoch (talk)."""


class Ranks(Section):
    """How many ranks a phase has."""

    initial: PositiveInt = 1
    """Ranks of the first phase."""
    max: PositiveInt | None = None
    """Largest number of ranks; None means as many as the hosts have cores or GPUs."""
    microbatches_per_rank: PositiveInt = 1
    """Microbatches of one step that a rank should carry before another rank is worth it."""


class Checkpoint(Section):
    """When states are saved, besides at every decision point."""

    model_config = ConfigDict(populate_by_name=True)

    every_seconds: PositiveFloat = 600.0
    """Longest time between checkpoints within a phase: what a kill can cost (ours)."""
    keep: Annotated[int, Field(ge=2)] = 3
    """Generations kept; at least two, so that a damaged one has a predecessor."""
    background: bool = Field(default=True, alias="async")
    """Write in a background thread while training goes on."""


class Launch(Section):
    """How the ranks are started."""

    launcher: Literal["mpirun", "horovodrun", "srun", "slurm"] = "mpirun"
    """Program that starts a phase."""
    hosts: str = ""
    """`host:slots,host:slots` as for `mpirun -H`; empty means this machine."""
    extra: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Words passed to the launcher as they are."""
    max_restarts: Count = 3
    """Restarts after failures without any progress in between before a run is given up (ours)."""
    slurm: dict[str, str | int | list[str]] = {}
    """Options of `sbatch` by their long names (`partition`, `account`, `time`, ...)."""

    @model_validator(mode="after")
    def _hosts_are_a_list(self) -> Launch:
        words = self.hosts.split(",") if self.hosts else []
        if not all(_HOST.fullmatch(word.strip()) for word in words):
            raise ValueError(
                f"hosts = {self.hosts!r}: expected host or host:slots, with commas between"
            )
        return self


class Job(Section):
    """A whole job file."""

    name: str
    """Name of the job, for people."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of initial weights, sample order, augmentation and dropout."""
    data: Data
    """What is learnt from."""
    model: Model
    """What learns."""
    train: Train
    """How steps are taken."""
    schedule: Schedule
    """What decides batch and learning rate."""
    hessian: Hessian = Hessian()
    """How the decisions' eigenvalue is found."""
    ranks: Ranks = Ranks()
    """How many processes there are."""
    checkpoint: Checkpoint = Checkpoint()
    """When states are saved."""
    launch: Launch = Launch()
    """How the processes are started."""

    @model_validator(mode="after")
    def _batches_are_whole_microbatches(self) -> Job:
        b = self.train.microbatch
        for key in ("base_batch", "max_batch"):
            value = getattr(self.schedule, key)
            if value is not None and value % b:
                raise ValueError(
                    f"schedule.{key} = {value}: expected a multiple of train.microbatch = {b}"
                )
        if self.ranks.max is not None and self.ranks.max < self.ranks.initial:
            raise ValueError(
                f"ranks.max = {self.ranks.max}: expected at least ranks.initial = "
                f"{self.ranks.initial}"
            )
        return self


def load(path: Path, overrides: tuple[str, ...] = ()) -> Job:
    """The job in `path` with `key=value` overrides applied.

    Raises:
        UsageError: one line that names file, key, value and what was expected.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as a job file: {error}") from None
    return parse(text, str(path), overrides)


def parse(text: str, origin: str, overrides: tuple[str, ...] = ()) -> Job:
    """As `load`, from a job file's text; `origin` names it in errors."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{origin}: not valid TOML: {error}") from None
    for override in overrides:
        _override(tables, override)
    try:
        return Job.model_validate(tables)
    except ValidationError as error:
        raise UsageError(f"{origin}: {_explain(error)}") from None


def dump(job: Job) -> str:
    """The job as TOML with every default spelled out; `parse` gives the same job back."""
    import tomli_w

    return tomli_w.dumps(job.model_dump(mode="json", exclude_none=True, by_alias=True))


def refuse_changes(saved: Job, now: Job, origin: str, allowed: tuple[str, ...]) -> None:
    """Refuse to go on with a job that could end otherwise than the one begun.

    Args:
        saved: the job that was begun.
        now: the job that is asked for.
        origin: where `saved` was found, for the error.
        allowed: keys that the user insists on changing.

    Raises:
        UsageError: names every key that differs.
    """
    old, new = _flat(saved.model_dump()), _flat(now.model_dump())
    changed = [
        key
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and key not in allowed
        and not any(key == part or key.startswith(f"{part}.") for part in WITHOUT_EFFECT)
    ]
    if changed:
        differences = "; ".join(f"{k} = {old.get(k)!r} there, {new.get(k)!r} here" for k in changed)
        raise UsageError(
            f"{origin}: of a job that differs: {differences}; use another --run-dir, "
            f"--fresh to begin anew, or insist with --allow-changed {changed[0]}"
        )


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _override(tables: dict[str, Any], override: str) -> None:
    """Apply `section.key=value`; the value is TOML, and a bare word is a string."""
    key, equals, value = override.partition("=")
    words = key.strip().split(".")
    if not equals or not all(words):
        raise UsageError(f"--set {override}: expected key=value, for example train.epochs=3")
    table: Any = tables
    for word in words[:-1]:
        table = table.setdefault(word, {})
        if not isinstance(table, dict):
            raise UsageError(f"--set {override}: {word} is a value, expected a table")
    try:
        table[words[-1]] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        table[words[-1]] = value.strip()


def _explain(error: ValidationError) -> str:
    """The first of pydantic's complaints as `key = value: expected ...`, with a count of others."""
    complaints = error.errors(include_url=False)
    first = complaints[0]
    union_tags = {"bl", "fb", "gg", "abs", "absa"}
    place = [str(word) for word in first["loc"] if word not in union_tags]
    if place[:2] == ["launch", "slurm"]:
        place = place[:3]  # after the option comes the type that was tried
    key = ".".join(place) or "job"
    more = f" (and {len(complaints) - 1} more)" if len(complaints) > 1 else ""
    match first["type"]:
        case "missing":
            message = f"{key}: missing, expected a value"
        case "extra_forbidden":
            message = f"{key} = {first['input']!r}: unknown key, expected {_siblings(first['loc'])}"
        case "value_error":
            section = f"{key}." if place else ""
            message = f"{section}{first['ctx']['error']}"
        case "union_tag_invalid":
            tags = ", ".join(sorted(union_tags))
            message = f"{key}.method = {first['ctx']['tag']!r}: expected one of {tags}"
        case "union_tag_not_found":
            message = f"{key}.method: missing, expected one of {', '.join(sorted(union_tags))}"
        case _:
            wanted = first["msg"].removeprefix("Input should be ")
            wanted = _IN_TOML.get(first["type"], wanted)
            message = f"{key} = {first['input']!r}: expected {wanted}"
    return message + more


def _siblings(location: tuple[int | str, ...]) -> str:
    """The keys that are known where an unknown one stood, the most similar ones first."""
    import difflib

    model: Any = Job
    for word in location[:-1]:
        if word in model.model_fields:
            annotation = model.model_fields[word].annotation
            if isinstance(annotation, type):
                model = annotation
        else:
            model = _SCHEDULES[str(word)]
    known = [field.alias or name for name, field in model.model_fields.items()]
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"{close[0]!r}?" if close else "one of " + ", ".join(sorted(known))


_IN_TOML = {
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "bool_type": "true or false",
}
"""What TOML calls things."""

_SCHEDULES = {
    "bl": Baseline,
    "fb": FacebookRule,
    "gg": GoogleRule,
    "abs": AdaptiveBatch,
    "absa": AdversarialAdaptiveBatch,
}
