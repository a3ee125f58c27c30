"""The job of a user's script: what its `Run` was given, as the tables of a job file.

So `job.toml` says how a run was made, and a run is not continued with other arguments.
"""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hpc_absa import config
from hpc_absa.allocation import MAX_RANKS, RUN_DIR
from hpc_absa.comm import Communicator
from hpc_absa.config import Job
from hpc_absa.curvature.loss import Loss
from hpc_absa.data.datasets import require_map_style
from hpc_absa.errors import CollectiveError, ExitStatus, UsageError
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.lock import SUPERVISED
from hpc_absa.schedules import Schedule
from hpc_absa.training.batches import NAME
from hpc_absa.training.optimizer import require_no_closure
from hpc_absa.training.rehearsal import require_real
from hpc_absa.training.state import Stateful, require_own_parameters

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler

TRAIN_KEYS = (
    "annealing",
    "lr_decay",
    "max_grad_norm",
    "milestones",
    "on_nonfinite_loss",
    "threads_per_rank",
)
"""Keys of `[train]` that a script may set; the others are arguments, or the script's own."""

TIMEOUTS = ("heartbeat_timeout", "progress_timeout")
"""Keys of `[launch]` that ranks read."""


def directory_of(given: str | os.PathLike[str] | None) -> Path:
    """The run directory: the argument, or `HPC_ABSA_RUN_DIR`, or `runs/SCRIPT`.

    Raises:
        UsageError: argument and variable name different folders.
    """
    environment = os.environ.get(RUN_DIR)
    if given is None:
        return Path(environment or Path("runs") / (Path(sys.argv[0]).stem or "script"))
    if environment and Path(given).resolve() != Path(environment).resolve():
        raise UsageError(
            f"absa.Run: the script's run directory is {os.fspath(given)}, and {RUN_DIR} is "
            f"{environment}: expected the same, hpc-absa launch --run-dir {os.fspath(given)}"
        )
    return Path(given)


def rank_limit(size: int, given: Any) -> int:
    """The most ranks that a decision may choose: without a supervisor those that there are."""
    limit = int(os.environ.get(MAX_RANKS, size))
    return min(limit, given) if isinstance(given, int) and given > 0 else limit


@dataclass(frozen=True)
class Arguments:
    """What a script gave to its `Run`, as its constructor describes it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss | None
    dataset: Any
    collate_fn: Callable[[list[Any]], Any] | None
    samples: int | None
    hessian_batch: Callable[[list[int]], Any] | None
    scaler: GradScaler | None
    states: Mapping[str, Stateful]
    """All that is saved beside model and optimizer."""
    tables: Mapping[str, Any]
    """`seed`, `schedule`, and the tables `data`, `train`, `hessian`, `ranks` and `checkpoint`."""
    train: Mapping[str, Any]
    """Further keys of `train`."""


def job_of(run: RunDir, given: Arguments, size: int) -> Job:
    """The job.

    Args:
        run: its directory.
        given: types and options are recorded.
        size: number of ranks.

    Raises:
        UsageError: one line that names key, value and what was expected.
    """
    _require_arguments(given)
    tables, optimizer, schedule = given.tables, given.optimizer, given.tables["schedule"]
    if isinstance(schedule, Schedule):  # what is not set may depend on the optimizer
        stated = {"method", *schedule.model_fields_set}
        schedule = schedule.model_dump(include=stated, by_alias=True)
    elif not isinstance(schedule, Mapping):
        raise UsageError(
            f"absa.Run: schedule = {schedule!r}: expected one such as absa.ABSA(base_batch=64, "
            "max_batch=1024)"
        )
    samples = len(given.dataset) if given.samples is None else operator.index(given.samples)
    ranks = dict(tables["ranks"])
    if isinstance(ranks.get("initial"), int):
        ranks["initial"] = min(ranks["initial"], rank_limit(size, ranks.get("max")))
    own = {"lr": base_lr(optimizer), "optimizer": reference(optimizer)}
    if given.loss is not None:
        own["loss"] = reference(given.loss)
    job = config.from_tables(
        {
            **tables,
            "name": os.path.basename(os.path.abspath(run.path)),
            "schedule": schedule,
            "data": {"name": NAME, "samples": samples, **tables["data"]},
            "model": {"name": NAME, "type": reference(given.model)},
            "train": {**own, **tables["train"], **given.train},
            "optimizer": {"groups": [_options(group) for group in optimizer.param_groups]},
            "ranks": ranks,
            "launch": _timeouts(run),
        },
        "absa.Run",
    )
    if samples < job.train.microbatch:
        raise UsageError(
            f"absa.Run: microbatch = {job.train.microbatch}: expected at most the "
            f"{samples} training samples"
        )
    return job


def _timeouts(run: RunDir) -> dict[str, Any]:
    """Those for ranks that hang, as `hpc-absa launch` was given them."""
    if SUPERVISED not in os.environ or not run.is_script:
        return {}
    launch = config.read(run.launch).get("launch", {})
    return {key: value for key, value in launch.items() if key in TIMEOUTS}


def reference(value: Any) -> str:
    """`module:name` of a function, or of the type of an object."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}:{named.__qualname__}"


def base_lr(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of the first group as the script gave it, without that of a scheduler."""
    group = optimizer.param_groups[0]
    return float(group.get("initial_lr", group["lr"]))


def plain(value: Any) -> Any:
    """A number of an optimizer's options as a float; others as they are."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a parameter group that TOML can have."""
    options: dict[str, Any] = {"parameters": sum(p.numel() for p in group["params"])}
    for key, value in group.items():
        if key in ("params", "lr", "initial_lr"):
            continue
        if isinstance(value, list | tuple) and all(isinstance(v, int | float) for v in value):
            options[key] = [plain(v) for v in value]
        elif isinstance(value := plain(value), float | bool | str):
            options[key] = value
    options["lr"] = float(group.get("initial_lr", group["lr"]))
    return options


# Checks


def require_equal_arguments(job: Job, comm: Communicator) -> None:
    """Refuse arguments that depend on the rank (a collective).

    Raises:
        CollectiveError: on all ranks, with the first key that differs.
    """
    texts = [text.splitlines() for text in comm.allgather_object(config.dump(job))]
    for rank, text in enumerate(texts):
        for first, other in zip_longest(texts[0], text, fillvalue="nothing"):
            if first != other:
                raise CollectiveError(
                    f"absa.Run: {first.strip()} on rank 0, {other.strip()} on rank {rank}: "
                    "expected the same arguments and the whole data set on all ranks; the run "
                    "divides the samples among them",
                    ExitStatus.USAGE,
                )


def _require_arguments(given: Arguments) -> None:
    """Refuse arguments that do not fit together.

    Raises:
        UsageError: one line.
    """
    samples: Any = given.samples
    if (given.dataset is None) == (samples is None):
        raise UsageError("absa.Run: expected either dataset or samples")
    if samples is None:
        require_map_style(given.dataset, "absa.Run: dataset")
    elif not hasattr(samples, "__index__"):
        raise UsageError(f"absa.Run: samples = {samples!r}: expected an integer")
    for value, kind in ((given.model, nn.Module), (given.optimizer, torch.optim.Optimizer)):
        if not isinstance(value, kind):
            raise UsageError(f"absa.Run: expected a torch {kind.__name__}, got {value!r:.80}")
    for key in given.train:
        if key not in TRAIN_KEYS:
            raise UsageError(
                f"absa.Run: train[{key!r}]: expected one of {', '.join(TRAIN_KEYS)}; the "
                "optimizer, the loss and the device are the script's"
            )
    for key in given.tables["hessian"]:
        if key.startswith("layer_"):
            raise UsageError(
                f"absa.Run: hessian[{key!r}]: expected none: only job files have learning "
                "rates and precision by layer"
            )
    reduction = getattr(given.loss, "reduction", "mean")
    if reduction != "mean":
        raise UsageError(
            f"absa.Run: the loss has reduction = {reduction!r}: expected a mean over the samples, "
            "or a function that returns (sum, denominator)"
        )
    if isinstance(given.model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise UsageError(
            f"absa.Run: the model is wrapped in {type(given.model).__name__}; expected the model "
            "itself, whose gradients the run reduces"
        )
    if not any(parameter.requires_grad for parameter in given.model.parameters()):
        raise UsageError("absa.Run: the model has no parameter with requires_grad, expected some")
    require_real(given.model, "absa.Run: model")
    if hasattr(given.optimizer, "skip_synchronize"):
        raise UsageError(
            "absa.Run: the optimizer is Horovod's DistributedOptimizer; expected the optimizer "
            "itself, since the run reduces the gradients"
        )
    require_no_closure(given.optimizer, f"absa.Run: optimizer {type(given.optimizer).__name__}")
    if any("lr" not in group for group in given.optimizer.param_groups):
        raise UsageError("absa.Run: expected an optimizer whose parameter groups have lr")
    require_own_parameters(given.optimizer, given.model)
    own = type(given.optimizer).state_dict is not torch.optim.Optimizer.state_dict
    if own and not any(state is given.optimizer for state in given.states.values()):
        raise UsageError(
            f"absa.Run: optimizer {type(given.optimizer).__name__} has a state_dict of its "
            "own, which checkpoints would not contain: expected it in state as well, as in "
            "state={'optimizer': optimizer}"
        )
    for name, state in given.states.items():
        if not (hasattr(state, "state_dict") and hasattr(state, "load_state_dict")):
            raise UsageError(
                f"absa.Run: state[{name!r}] is of type {type(state).__name__}: expected an object "
                "with state_dict and load_state_dict"
            )
