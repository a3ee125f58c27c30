"""`hpc-absa attack`: how accurate a model is on inputs that were changed to fool it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from hpc_absa.adversarial import plot, robustness
from hpc_absa.adversarial.robustness import Batch, Examples, InputSpace, Options, Robustness
from hpc_absa.comm import Communicator, raise_on_all_ranks
from hpc_absa.console import rich_console
from hpc_absa.curvature.export import to_dict
from hpc_absa.data.packed import PackedDataset
from hpc_absa.rundir.files import require_replaceable
from hpc_absa.training.load import Loaded, Source, load, on_ranks


def attack(source: Source, out: Path | None, as_json: bool, options: Options) -> int:
    """Print the robustness of a model, and draw it to `out`; the entry point of one rank."""

    def command(comm: Communicator) -> int:
        raise_on_all_ranks(comm, options.check)
        if out:
            raise_on_all_ranks(comm, lambda: require_replaceable(Path(f"{out}.png")))
        loaded = load(source, comm)
        with Console(stderr=True, quiet=comm.rank > 0).status("attack") as status:
            found, examples = attack_model(loaded, comm, options, status.update)
        if comm.rank == 0:
            if as_json:
                print(json.dumps(to_dict(found), allow_nan=False))
            else:
                rich_console().print(table(found))
            if out:
                path = Path(f"{out}.png")
                draw(found, examples, loaded, path)
                print(f"written: {path}", file=sys.stderr)
        return 0

    return on_ranks(command)


def attack_model(
    loaded: Loaded,
    comm: Communicator,
    options: Options,
    progress: Callable[[str], None] = lambda name: None,
) -> tuple[Robustness, list[Examples]]:
    """Every attack on the test samples (a collective)."""
    reader = loaded.loader.reader
    scale = reader.input_scale() / (255 if _is_image(loaded) else 1)
    space = InputSpace(reader.input_range(), scale)
    indices = raise_on_all_ranks(comm, lambda: loaded.test_indices(options.samples))
    chunks = [indices[i : i + robustness.BATCH] for i in range(0, len(indices), robustness.BATCH)]
    batches = [partial(_batch, loaded, chunk) for chunk in chunks]
    made = robustness.build(options, loaded.model, loaded.loss, space)
    return robustness.measure(loaded.model, batches, made, comm, loaded.origin, progress)


def table(found: Robustness) -> Table:
    """One row for each attack."""
    made = Table(
        title=f"{found.origin}: {100 * found.accuracy:.2f} % of {found.samples} test samples",
        title_justify="left",
    )
    for name in ("attack", "accuracy %", "fooled %", "mean", "median", "largest", "s/sample"):
        made.add_column(name, justify="left" if name == "attack" else "right", no_wrap=True)
    for result in found.results:
        made.add_row(
            result.attack, f"{100 * result.accuracy:.2f}", f"{100 * result.fooled:.1f}",
            f"{result.mean:.3g}", f"{result.quantiles[1]:.3g}", f"{result.largest:.3g}",
            f"{result.seconds_per_sample:.3g}",
        )  # fmt: skip
    made.caption = "mean and largest ‖δ‖/‖x‖ of all samples, its median of those fooled"
    made.caption_justify = "left"
    return made


def draw(found: Robustness, examples: list[Examples], loaded: Loaded, path: Path) -> None:
    """Write the figure, with examples of the last attack that fooled samples, if images."""
    dataset = loaded.dataset
    if not isinstance(dataset, PackedDataset) or not (
        examples and dataset.is_image and dataset.channels in (1, 3)
    ):
        plot.draw(found, None, (), lambda inputs: inputs, path)
        return
    mean, std = dataset.mean[:, None, None], dataset.std[:, None, None]
    plot.draw(found, examples[-1], dataset.classes, lambda inputs: inputs * std + mean, path)


def _is_image(loaded: Loaded) -> bool:
    return isinstance(loaded.dataset, PackedDataset) and loaded.dataset.is_image


def _batch(loaded: Loaded, indices: NDArray[np.int64]) -> Batch:
    inputs, targets = loaded.loader.reader.read("test", indices)
    return indices, inputs, targets
