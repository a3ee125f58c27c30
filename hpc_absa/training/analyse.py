"""`hpc-absa analyse`: curvature and robustness at every kept checkpoint of one run or several.

The study of large batches of arXiv:1802.08241. What was computed for a checkpoint is kept in the
output folder, so that a stopped analysis continues where it was.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from hpc_absa.adversarial.robustness import Options as AttackOptions
from hpc_absa.comm import Communicator, raise_on_all_ranks
from hpc_absa.console import rich_console
from hpc_absa.curvature.export import to_dict
from hpc_absa.curvature.operator import HessianOperator, evaluation_mode
from hpc_absa.curvature.spectrum import Spectrum
from hpc_absa.errors import CheckpointError, UsageError
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.events import nan_as_none
from hpc_absa.rundir.files import require_replaceable, write_atomic
from hpc_absa.training import analyse_plot
from hpc_absa.training.attack import attack_model
from hpc_absa.training.load import Loaded, Source, load, on_ranks
from hpc_absa.training.spectrum import spectrum_of

FORMAT = "hpc-absa-analysis"

Point = Mapping[str, Any]
"""What is known about one checkpoint, as JSON values (`measure`)."""


@dataclass(frozen=True)
class Options:
    """How much to compute at each checkpoint."""

    samples: int = 256
    """Training samples of the Hessian."""
    k: int = 2
    """Top eigenvalues."""
    trace_matvecs: int = 30
    """Products for the trace."""
    density_steps: int = 40
    """Products for each probe vector of the density."""
    surface: int = 0
    """Points along each side of the loss surface; 0 for none."""
    attacks: tuple[str, ...] = ("fgsm", "pgd", "tr-l2-easy")
    attack_samples: int = 200
    epsilons: tuple[float, ...] = (2.0,)
    last: bool = False
    """Only the newest checkpoint of each run."""


def analyse(
    directories: Sequence[Path], root: str | None, out: Path, as_json: bool, options: Options
) -> int:
    """Print the table and write the figure; the entry point of one rank."""

    def command(comm: Communicator) -> int:
        attacks = AttackOptions(options.attacks, options.attack_samples, options.epsilons)
        raise_on_all_ranks(comm, attacks.check)
        files = raise_on_all_ranks(comm, lambda: _checkpoints(directories, options.last))
        files = comm.broadcast_object(files)  # a run may still be adding some
        raise_on_all_ranks(comm, lambda: _prepare(out) if comm.rank == 0 else None)
        points = []
        with Console(stderr=True, quiet=comm.rank > 0).status("analyse") as status:
            for number, (name, path) in enumerate(files, 1):
                progress = partial(_progress, status, f"{number} of {len(files)}, {path}")
                points.append(_point(name, path, root, out, comm, options, attacks, progress))
        if comm.rank == 0:
            if as_json:
                print(json.dumps({"points": points}, allow_nan=False))
            else:
                rich_console().print(table(points))
            figure = out / "analysis.png"
            analyse_plot.draw(points, figure)
            found = {"format": FORMAT, "points": points}
            write_atomic(out / "analysis.json", json.dumps(found, allow_nan=False))
            print(f"written: {out / 'analysis.json'} and {figure}", file=sys.stderr)
        return 0

    return on_ranks(command)


def _prepare(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("analysis.json", "analysis.png"):
        require_replaceable(out / name)


def _progress(status: Any, checkpoint: str, part: str) -> None:
    status.update(f"{checkpoint}: {part}")


def _checkpoints(directories: Sequence[Path], last: bool) -> list[tuple[str, Path]]:
    """A name of the run and the file of each checkpoint, by run, oldest first."""
    found = []
    for directory in directories:
        files = RunDir(directory).checkpoint_files()
        if not files:
            raise UsageError(f"{directory}: no checkpoint here, expected a run directory")
        name = _name(directory, directories)
        found += [(name, path) for path in (files[-1:] if last else files)]
    return found


def _name(directory: Path, all_: Sequence[Path]) -> str:
    """The folder's name, with its parents where others have the same."""
    resolved = [path.resolve() for path in all_]
    mine = directory.resolve()
    for length in range(1, len(mine.parts)):
        name = "/".join(mine.parts[-length:])
        if sum("/".join(path.parts[-length:]) == name for path in resolved) == 1:
            return name
    return str(mine)


def _point(
    name: str,
    path: Path,
    root: str | None,
    out: Path,
    comm: Communicator,
    options: Options,
    attacks: AttackOptions,
    progress: Callable[[str], None],
) -> Point:
    """From the output folder, or computed now (a collective)."""
    kept = out / f"{name.replace('/', '_')}-{path.stem}.json"
    key = raise_on_all_ranks(comm, lambda: _key(path, options))
    before = comm.broadcast_object(_read(kept, key) if comm.rank == 0 else None)
    if before is not None:
        point: Point = before
        return point
    point = measure(load(Source(path, root), comm), comm, name, options, attacks, progress)
    if comm.rank == 0:
        write_atomic(kept, json.dumps({"key": key, "point": point}, allow_nan=False))
    return point


def _key(path: Path, options: Options) -> Mapping[str, Any]:
    """Of what is kept for a checkpoint, as JSON values.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        modified = path.stat().st_mtime_ns
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(
            f"{path}: cannot be read: {reason}; its run may have removed it (checkpoint.keep)"
        ) from None
    key = {"file": str(path.resolve()), "modified": modified, **asdict(options)}
    return json.loads(json.dumps(key))


def _read(path: Path, key: Mapping[str, Any]) -> Point | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found["point"] if found["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measure(
    loaded: Loaded,
    comm: Communicator,
    name: str,
    options: Options,
    attacks: AttackOptions,
    progress: Callable[[str], None],
) -> Point:
    """Everything about one checkpoint (a collective)."""
    start = time.perf_counter()
    progress("accuracy")
    count = 0 if loaded.dataset.test is None else len(loaded.dataset.test)
    test = loaded.evaluate(loaded.model, comm, "test", np.arange(count))
    found = spectrum_of(
        loaded, comm, samples=options.samples, k=options.k, layers=False,
        trace_matvecs=options.trace_matvecs, density_steps=options.density_steps,
        progress=lambda part, products: progress(f"{part}, {products} products"),
    )  # fmt: skip
    progress("loss surface")
    grid = surface(loaded, found, comm, options.surface) if options.surface > 1 else None
    robustness = attack_model(loaded, comm, attacks, progress)[0] if attacks.attacks else None
    results = robustness.results if robustness else ()
    attributes = loaded.attributes
    density = found.density
    point = {
        "run": name,
        "checkpoint": loaded.origin,
        "method": loaded.job.schedule.method,
        "batch": int(attributes["global_batch"]),
        "largest_batch": loaded.job.schedule.largest_batch,
        "epoch": float(attributes["samples"]) / len(loaded.dataset.train),
        "step": int(attributes["step"]),
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "train_loss": found.loss,
        "parameters": found.parameters,
        "eigenvalues": to_dict(found.top.values),
        "residuals": to_dict(found.top.residuals),
        "lowest": found.lowest,
        "trace": found.trace.value,
        "trace_error": found.trace.error,
        "negative": [density.negative_low, density.negative, density.negative_high],
        "density": {"grid": to_dict(density.grid), "density": to_dict(density.density)},
        "slices": to_dict(found.slices),
        "surface": grid,
        "clean": robustness.accuracy if robustness else None,
        "robust": {result.attack: result.accuracy for result in results},
        "perturbation": {result.attack: result.mean for result in results},
        "seconds": comm.broadcast_object(time.perf_counter() - start),
    }
    return nan_as_none(point)


def surface(
    loaded: Loaded, found: Spectrum, comm: Communicator, points: int
) -> Mapping[str, Any] | None:
    """The loss on a grid in the plane of the top two eigenvectors (a collective)."""
    if len(found.slices) < 2:
        return None
    sample = loaded.training_sample(found.samples)
    vectors = [torch.from_numpy(vector) for vector in found.top.vectors[:2]]
    reach = [float(line.distances[-1]) for line in found.slices[:2]]
    axes = [np.linspace(-r, r, points) for r in reach]
    with evaluation_mode(loaded.model):
        operator = HessianOperator(
            loaded.model, loaded.loss, sample, comm, samples=sample.size,
            microbatch=loaded.stream.microbatch,
        )  # fmt: skip
        losses = [
            [operator.loss(float(x) * vectors[0] + float(y) * vectors[1]) for y in axes[1]]
            for x in axes[0]
        ]
    return {"first": axes[0].tolist(), "second": axes[1].tolist(), "losses": losses}


def table(points: Sequence[Point]) -> Table:
    """One row for each checkpoint."""
    made = Table(
        title="Curvature and robustness", title_justify="left", box=box.SIMPLE, padding=(0, 0, 0, 1)
    )
    attacks = list(dict.fromkeys(name for point in points for name in point["robust"]))
    columns = ("run", "epoch", "batch", "test %", "λ₁", "trace", "negative %")
    units = (f"{name} {'‖δ‖/‖x‖' if _is_unlimited(name) else '%'}" for name in attacks)
    for column in (*columns, *units):
        made.add_column(column, justify="left" if column == "run" else "right", overflow="fold")
    for point in points:
        low, _, high = point["negative"]
        made.add_row(
            point["run"], f"{point['epoch']:.3g}", str(point["batch"]),
            _percent(point["test_accuracy"]), _number(point["eigenvalues"][0]),
            f"{_number(point['trace'], 3)} ± {_number(point['trace_error'], 2)}",
            "?" if low is None or high is None else f"{100 * low:.0f} – {100 * high:.0f}",
            *(_under(point, name) for name in attacks),
        )  # fmt: skip
    made.caption = "test %, and under attack: accuracy; ‖δ‖/‖x‖: mean perturbation of all samples"
    made.caption_justify = "left"
    return made


def _is_unlimited(attack: str) -> bool:
    """It continues until a sample is fooled: the size of the perturbation is its result."""
    return attack.startswith("tr-")


def _under(point: Point, attack: str) -> str:
    if attack not in point["robust"]:
        return ""
    if _is_unlimited(attack):
        return _number(point["perturbation"][attack], 3)
    return _percent(point["robust"][attack])


def _number(value: float | None, digits: int = 4) -> str:
    if value is None:
        return "?"
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"


def _percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}"
