"""`hpc-absa spectrum`: the Hessian of the model in a checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hpc_absa import config
from hpc_absa.checkpoint import Content
from hpc_absa.checkpoint.restore import load
from hpc_absa.comm import Communicator, connect, raise_on_all_ranks
from hpc_absa.config import Job
from hpc_absa.console import rich_console
from hpc_absa.curvature import export, plot
from hpc_absa.curvature import spectrum as curvature
from hpc_absa.errors import CollectiveError
from hpc_absa.plan import stream_of
from hpc_absa.rundir import RunDir
from hpc_absa.torchvision_import import prepare_torchvision
from hpc_absa.training.data import build_loader, hessian_sample, open_data
from hpc_absa.training.setup import build_model_and_loss, device_of, threads_per_rank
from hpc_absa.training.state import load_model


def spectrum(
    checkpoint: Path, root: str | None, out: Path | None, as_json: bool, **settings: Any
) -> int:
    """Print the spectrum at a checkpoint, and save it to `out`; the entry point of one rank.

    `settings` are those of `curvature.spectrum`: `samples`, `k`, `layers`, `matrix`.
    """
    comm = connect()
    try:
        if out:
            raise_on_all_ranks(comm, lambda: export.require_replaceable(Path(f"{out}.h5")))
        result = _spectrum(comm, checkpoint, root, **settings)
    except CollectiveError as error:
        if comm.rank == 0:
            print(f"hpc-absa: {error}", file=sys.stderr)
        return int(error.status)
    finally:
        comm.close()
    if comm.rank == 0:
        if as_json:
            print(json.dumps(export.to_dict(result), allow_nan=False))
        else:
            print(export.heading(result))
            for table in export.tables(result):
                rich_console().print(table)
        if out:
            tables, figure = Path(f"{out}.h5"), Path(f"{out}.png")
            export.save(result, tables)
            plot.draw(result, figure)
            print(f"written: {tables} and {figure}", file=sys.stderr)
    return 0


def _spectrum(
    comm: Communicator, checkpoint: Path, root: str | None, samples: int, **settings: Any
) -> curvature.Spectrum:
    prepare_torchvision()
    content = load(checkpoint, comm)
    job = raise_on_all_ranks(comm, lambda: _job(content, checkpoint, root))
    torch.set_num_threads(threads_per_rank(job, comm.local_size))
    device = raise_on_all_ranks(comm, lambda: device_of(job, comm))
    dataset = open_data(job, RunDir(checkpoint.resolve().parent.parent), comm)
    model, loss = raise_on_all_ranks(comm, lambda: build_model_and_loss(job, dataset, device))
    raise_on_all_ranks(
        comm, lambda: load_model(model, content.groups["model"].arrays, str(checkpoint))
    )
    course = stream_of(job, len(dataset.train))
    sample = hessian_sample(job, build_loader(job, dataset, course, device), course, samples)
    with Console(stderr=True, quiet=comm.rank > 0).status("spectrum") as status:
        return curvature.spectrum(
            model, loss, sample, comm, samples=sample.size, microbatch=course.microbatch,
            **settings,
            progress=lambda part, products: status.update(f"{part}, {products} products so far"),
        )  # fmt: skip


def _job(content: Content, checkpoint: Path, root: str | None) -> Job:
    override = (f"data.root={json.dumps(root)}",) if root else ()
    return config.parse(
        str(content.groups["job"].attributes["text"]), str(checkpoint), override, warn=False
    )
