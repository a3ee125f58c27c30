"""Commands at both ends of a run: a job file to begin with, and the trained model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from hpc_absa.cli.options import Json, print_line
from hpc_absa.errors import ExitStatus

Model = Annotated[
    Path, Argument(metavar="D", help="Run directory (its newest good checkpoint), or a checkpoint.")
]


def evaluate(
    path: Model,
    root: Annotated[str | None, Option(help="Folder of the data set (data.root).")] = None,
    weights: Annotated[
        Path | None, Option(help="Measure these weights: .pt, .safetensors or .npz.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Measure loss and metrics of a run's model on its test set.

    Runs alone or on several ranks. Example: `hpc-absa evaluate runs/digits`
    """
    from hpc_absa.training import evaluation
    from hpc_absa.training.load import Source

    return evaluation.evaluation(Source(path, root, weights), as_json)


def export(
    path: Model,
    out: Annotated[Path, Argument(metavar="FILE", help="New file: .pt, .safetensors or .npz.")],
) -> int:
    """Write a run's model to a file that needs no code of this program: a plain state_dict.

    Example: `hpc-absa export runs/digits digits.safetensors`

    In PyTorch: `model.load_state_dict(torch.load("digits.pt"))`. In a job: `model.weights`.
    """
    from hpc_absa.training import evaluation

    print_line(f"written: {out}, the model of {evaluation.export(path, out)}")
    return ExitStatus.OK


def init(
    out: Annotated[Path, Argument(metavar="JOB", help="New job file.")] = Path("job.toml"),
    data: Annotated[
        str, Option(help="data.name: built-in, or package.module:function.")
    ] = "digits",
    model: Annotated[
        str | None, Option(help="model.name: built-in, or package.module:function.")
    ] = None,
    root: Annotated[str | None, Option(help="data.root: folder of the data set.")] = None,
    loss: Annotated[str | None, Option(help="train.loss.")] = None,
    optimizer: Annotated[str, Option(help="train.optimizer.")] = "sgd",
) -> int:
    """Write a commented job file to begin with.

    Example: `hpc-absa init --data mydata:lines --model mymodel:transformer --optimizer adamw`
    """
    from hpc_absa.config import template

    template.write(out, data, model, root, loss, optimizer)
    job = shlex.quote(str(out))
    print_line(
        f"written: {out}; see what it will do: hpc-absa plan {job}; train: hpc-absa run {job}"
    )
    return ExitStatus.OK
