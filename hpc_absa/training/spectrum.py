"""`hpc-absa spectrum`: the Hessian of the model in a checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from hpc_absa.comm import Communicator, raise_on_all_ranks
from hpc_absa.console import rich_console
from hpc_absa.curvature import export, plot
from hpc_absa.curvature import spectrum as curvature
from hpc_absa.training.load import Loaded, Source, load, on_ranks


def spectrum(source: Source, out: Path | None, as_json: bool, **settings: Any) -> int:
    """Print the spectrum at a checkpoint, and save it to `out`; the entry point of one rank.

    `settings` are those of `curvature.spectrum`: `samples`, `k`, `layers`, `matrix`.
    """

    def command(comm: Communicator) -> int:
        if out:
            raise_on_all_ranks(comm, lambda: export.require_replaceable(*_files(out)))
        loaded = load(source, comm)
        with Console(stderr=True, quiet=comm.rank > 0).status("spectrum") as status:
            result = spectrum_of(
                loaded, comm, **settings,
                progress=lambda part, count: status.update(f"{part}, {count} products so far"),
            )  # fmt: skip
        if comm.rank == 0:
            _print(result, out, as_json)
        return 0

    return on_ranks(command)


def spectrum_of(
    loaded: Loaded, comm: Communicator, *, samples: int, **settings: Any
) -> curvature.Spectrum:
    """The spectrum over the first `samples` of the decisions' sample (a collective)."""
    sample = loaded.training_sample(samples)
    return curvature.spectrum(
        loaded.model, loaded.loss, sample, comm, samples=sample.size,
        microbatch=loaded.stream.microbatch, **settings,
    )  # fmt: skip


def _files(out: Path) -> tuple[Path, Path]:
    return Path(f"{out}.h5"), Path(f"{out}.png")


def _print(result: curvature.Spectrum, out: Path | None, as_json: bool) -> None:
    if as_json:
        print(json.dumps(export.to_dict(result), allow_nan=False))
    else:
        print(export.heading(result))
        for table in export.tables(result):
            rich_console().print(table)
    if out:
        tables, figure = _files(out)
        export.save(result, tables)
        plot.draw(result, figure)
        print(f"written: {tables} and {figure}", file=sys.stderr)
