"""The commented job file that `hpc-absa init` writes."""

from __future__ import annotations

import json
from pathlib import Path

from hpc_absa.config.file import parse
from hpc_absa.config.tables import is_adaptive
from hpc_absa.errors import UsageError
from hpc_absa.rundir.files import create_once

_TEMPLATE = """\
# All keys: docs/job-file.md.   hpc-absa plan FILE   hpc-absa doctor FILE   hpc-absa run FILE
name = {name}
seed = 0

[data]
name = {data}          # built-in, or "package.module:function"; docs/data.md
{root}
# workers = 2            # processes of each rank that read a torch.utils.data.Dataset

[model]
name = {model}         # built-in, torchvision's, or "package.module:function"
# weights = "start.pt"   # to start from; also .safetensors and .npz
# any other key is an argument of the model

[train]
epochs = 20
microbatch = 32          # samples of one forward and backward pass on one rank
optimizer = {optimizer}      # sgd, adamw, lars, lamb, adahessian, or "package.module:Class"
lr = {lr}               # at schedule.base_batch
weight_decay = {decay}
loss = {loss}   # bce_with_logits, mse, l1, huber, or "package.module:function"
# metrics = ["accuracy"] # the first is shown; the default suits the loss
# milestones = [12, 17]  # epochs after which lr is multiplied by lr_decay
# reproducible = true    # the same bits on 1, 2, 4, ... ranks

# [optimizer]            # its other arguments
# {arguments}

[schedule]
method = {method}          # or bl, fb, gg, abs, absa, absa-tuned, gns, ...; docs/schedules.md
base_batch = 32          # global batch at the start
max_batch = 128          # largest global batch
# kappa = 10             # the batch grows after so many decisions at the latest

[ranks]
initial = 1
max = 4                  # more ranks are used as the batch grows
"""


def write(
    path: Path,
    data: str,
    model: str | None,
    root: str | None,
    loss: str | None,
    optimizer: str,
) -> None:
    """Write a job file to `path`, which must not exist.

    Raises:
        UsageError: the file exists, or a name that no job can have.
    """
    if model is None:
        if data != "digits":
            raise UsageError("--model: missing, expected a model's name for this data")
        model = "digits-cnn"
    own, adaptive = ":" in data, is_adaptive(optimizer)
    folder = f"root = {json.dumps(root)}" if root else '# root = "~/data"       # its folder'
    text = _TEMPLATE.format(
        name=json.dumps(path.stem),
        data=json.dumps(data),
        root=folder,
        model=json.dumps(model),
        optimizer=json.dumps(optimizer),
        lr="1e-3" if adaptive else "0.05",
        decay="0.01" if adaptive else "5e-4",
        loss=json.dumps(loss or "cross_entropy"),
        arguments="betas = [0.9, 0.95]" if adaptive else "nesterov = true",
        # adversarial examples need a range of valid inputs, which images have
        method='"abs"' if own else '"absa"',
    )
    parse(text, str(path))
    if not create_once(path, text):
        raise UsageError(f"{path}: exists; remove it or choose another name")
