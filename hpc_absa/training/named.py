"""Whether what a job names can be built, without its data: for `plan` and `doctor`."""

from __future__ import annotations

import torch

from hpc_absa import plugins
from hpc_absa.config import Job
from hpc_absa.errors import UsageError
from hpc_absa.models import build as build_model
from hpc_absa.models import build_loss
from hpc_absa.schedules import build as build_rule
from hpc_absa.training import optimizer as optimizers

TYPICAL_IMAGES = {"channels": 3, "image_size": 32, "classes": 10}
CLASSES = {"cifar100": 100, "tinyimagenet": 200, "imagenet": 1000}


def require_buildable(job: Job) -> int | None:
    """Build the job's schedule, loss, model and optimizer, for typical images and without memory.

    The user's own model and data are only imported, because they may need other sizes.

    Returns:
        Parameters of the model; None for the user's own.

    Raises:
        UsageError: one of them is unknown, or has an argument that it does not take.
    """
    build_rule(job)
    arguments = job.loss.arguments
    if smoothing := job.train.label_smoothing:
        arguments = {"label_smoothing": smoothing, **arguments}
    build_loss(job.train.loss, arguments)
    names = [
        ("data.name", job.data.name),
        ("model.name", job.model.name),
        ("train.optimizer", job.train.optimizer),
        *(("train.metrics", name) for name in job.train.metrics or ()),
    ]
    for key, name in names:
        if plugins.is_reference(name):
            plugins.resolve(name, key)
    if plugins.is_reference(job.model.name):
        return None
    images = {**TYPICAL_IMAGES, "classes": CLASSES.get(job.data.name, 10)}
    try:
        with torch.device("meta"):
            model = build_model(job.model.name, job.model.arguments, **images)
    except (TypeError, ValueError) as error:  # of an argument's value
        raise UsageError(f"model.name = {job.model.name!r}: {error}") from None
    optimizers.build(job.train, job.optimizer.arguments, model, lr=job.train.lr)
    return sum(parameter.numel() for parameter in model.parameters())
