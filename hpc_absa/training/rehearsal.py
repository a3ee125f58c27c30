"""One microbatch through everything that a run does, before its first step.

What a user's model, loss or data cannot do is then one line that names it, in seconds, instead of a
traceback on every rank at the first evaluation or the first estimate of the eigenvalue. Nothing is
changed: weights, buffers, random states and gradients have the same bits afterwards.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hpc_absa.adversarial.fgsm import has_floats, perturb
from hpc_absa.curvature.check import check_curvature
from hpc_absa.curvature.fast import copied
from hpc_absa.curvature.loss import split
from hpc_absa.curvature.twice import CurvatureError
from hpc_absa.data.loader import Loader
from hpc_absa.errors import CollectiveError, ExitStatus, UsageError
from hpc_absa.plugins import user_code
from hpc_absa.training.evaluate import call
from hpc_absa.training.state import load_model, to_array

if TYPE_CHECKING:
    from hpc_absa.training.trainer import Trainer

CROSS_ENTROPY = "train.loss = 'cross_entropy'"
BCE = "train.loss = 'bce_with_logits'"
"""The names of built-in losses in messages."""


def rehearse(trainer: Trainer) -> None:
    """Rehearse on every rank, with the same samples (a collective).

    Raises:
        CollectiveError: it failed on all ranks: a usage error, whose line names what to change.
        Exception: it failed on this rank and not on another one, which is no usage error.
    """
    run, error = trainer.run, None
    with run.clock("rehearsal"):
        try:
            _rehearse(trainer)
        except Exception as raised:
            traceback.print_exception(raised)
            error = raised
    errors = run.comm.allgather_object(None if error is None else str(error))
    if all(errors):
        raise CollectiveError(errors[0], ExitStatus.USAGE)
    if error is not None:
        raise error.__cause__ or error


def _rehearse(trainer: Trainer) -> None:
    run, model, dataset = trainer.run, trainer.model, trainer.loader.dataset
    model_name, loss_name = trainer.names
    b, progress = run.stream.microbatch, run.state.progress
    indices = np.arange(b) * len(dataset.train) // b
    inputs, targets = trainer.loader.sample(indices)
    with preserved(trainer):
        for parameter in model.parameters():
            parameter.grad = None
        require_real(model, model_name)
        with user_code(f"{model_name}: its forward pass in training mode"):
            outputs = trainer.forward(copied(inputs))
        if loss_name == CROSS_ENTROPY:
            require_scores(outputs, targets, len(dataset.classes), model_name, loss_name)
        if loss_name == BCE:
            _require_labels(targets)
        with user_code(f"{loss_name}: called with {_shape(outputs)} and targets {_shape(targets)}"):
            result = trainer.loss(outputs, targets)
        loss = _require_loss(result, loss_name)
        _require_denominator(trainer.loss, result, targets, b, loss_name)
        if not progress.position.step and run.options.on_nonfinite_loss == "stop":
            _require_finite(loss, model_name, loss_name)
        with user_code(f"{model_name}: its backward pass"):
            loss.backward()
        _require_gradients(model, model_name, trainer.reproducible)
        for parameter in model.parameters():
            parameter.grad = None
        run.engine.buffers.restore()
        if dataset.test is not None:
            _rehearse_evaluation(trainer, inputs, targets)
        if trainer.adversary and run.adversarial_fraction:
            _require_floats(inputs)
            with user_code(f"{model_name}: the gradient by its inputs, for adversarial examples"):
                step, valid = trainer.adversary.step, trainer.adversary.valid
                perturb(model, trainer.loss, inputs, targets, step, valid, call=call)
        by_layer = trainer.rates or trainer.precision
        if by_layer or run.rule.wants_eigenvalue(progress.schedule):
            _rehearse_hessian(trainer, indices)
        run.engine.buffers.restore()
        _rehearse_checkpoint(trainer)


def _rehearse_evaluation(trainer: Trainer, inputs: Any, targets: Any) -> None:
    model, (model_name, loss_name) = trainer.model, trainer.names
    model.eval()
    with torch.no_grad():
        with user_code(f"{model_name}: its forward pass in evaluation mode"):
            outputs = call(model, copied(inputs))
        if any(metric.name == "accuracy" and metric.required for metric in trainer.metrics):
            classes = len(trainer.loader.dataset.classes)
            require_scores(outputs, targets, classes, model_name, loss_name)
        with user_code(f"{loss_name}: called in evaluation with {_shape(outputs)}"):
            trainer.loss(outputs, targets)
        for metric in trainer.metrics:
            with user_code(f"train.metrics: {metric.name} of {_shape(outputs)}"):
                metric.sums(outputs, targets)


def _rehearse_hessian(trainer: Trainer, indices: NDArray[np.int64]) -> None:
    hint = (
        "the Hessian needs a model and a loss that can be differentiated twice, which scripted "
        "models cannot; or choose schedule.method = 'bl', 'fb', 'gg' or 'gns' without "
        "hessian.layer_rates and hessian.layer_precision"
    )
    with user_code(f"{trainer.names[0]}: its Hessian, which the job needs", hint):
        sample = _Sample(trainer.loader, indices)
        notes = check_curvature(trainer.model, trainer.loss, sample, microbatch=sample.size)
    for note in notes:
        trainer.run.log.print(note)


class _Sample:
    """One microbatch as the sample of a Hessian."""

    def __init__(self, loader: Loader, indices: NDArray[np.int64]) -> None:
        self.loader, self.indices, self.size = loader, indices, len(indices)

    def load(self, start: int, stop: int) -> tuple[Any, Any]:
        return self.loader.sample(self.indices[start:stop])


def _rehearse_checkpoint(trainer: Trainer) -> None:
    """The model's state as arrays, and back."""
    trainer.run.state.tensors()
    with user_code(f"{trainer.names[0]}: saving and loading its state_dict"):
        arrays = {key: to_array(value) for key, value in trainer.model.state_dict().items()}
        load_model(trainer.model, arrays, "the rehearsal")


def require_real(model: nn.Module, name: str) -> None:
    """
    Raises:
        UsageError: a trainable parameter is complex; the line names `name` and the parameter.
    """
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.is_floating_point():
            raise UsageError(
                f"{name}: the parameter {key} is {parameter.dtype}, expected real numbers: keep a "
                "complex one as torch.view_as_real of it"
            )


def require_scores(outputs: Any, targets: Any, classes: int, model: str, loss: str) -> None:
    """Refuse outputs whose accuracy cannot be measured, where targets are the class of each sample.

    Raises:
        UsageError: the shape does not fit the classes; the line names `model` and `loss`.
    """
    if not classes or not isinstance(targets, Tensor) or targets.dim() != 1:
        return
    samples = len(targets)
    one = "; or [b] or [b, 1] with a loss for one output" if classes == 2 else ""
    expected = f"expected one score per class, [{samples}, {classes}]{one}"
    if not isinstance(outputs, Tensor):
        kind = type(outputs).__name__
        raise UsageError(f"{model}: in evaluation mode it returns a {kind}; {expected}")
    shape = list(outputs.shape)
    single = classes == 2 and loss != CROSS_ENTROPY and shape in ([samples], [samples, 1])
    if not single and (outputs.dim() != 2 or shape[0] != samples or shape[1] < max(2, classes)):
        raise UsageError(
            f"{model}: it returns outputs {shape} for {samples} samples of {classes} classes; "
            f"{expected}"
        )


def _require_labels(targets: Any) -> None:
    if isinstance(targets, Tensor) and ((targets < 0) | (targets > 1)).any():
        raise UsageError(
            f"{BCE}: targets are from {targets.min().item():g} to {targets.max().item():g}, "
            "expected 0 and 1 for each label"
        )


def _require_floats(inputs: Any) -> None:
    if not has_floats(inputs):
        kinds = sorted({str(x.dtype) for x in tree_leaves(inputs) if isinstance(x, Tensor)})
        raise UsageError(
            f"schedule.ratio: adversarial examples need inputs of floating point, these are "
            f"{', '.join(kinds) or 'no tensors'}; choose schedule.method = 'abs', or "
            "schedule.ratio = 0"
        )


def _require_loss(result: Any, name: str) -> Tensor:
    """The value to differentiate: the mean, or the sum."""
    loss = result[0] if isinstance(result, tuple) and len(result) == 2 else result
    if not isinstance(loss, Tensor) or loss.dim():
        raise UsageError(
            f"{name}: it returned {_shape(loss)}, expected one number, the mean over the samples, "
            "or (sum, denominator)"
        )
    if not loss.requires_grad:
        raise UsageError(f"{name}: its value does not depend on a trainable parameter")
    return loss


def _require_denominator(loss_fn: Any, result: Any, targets: Any, samples: int, name: str) -> None:
    try:
        split(loss_fn, result, targets, samples)
    except CurvatureError as error:
        raise UsageError(f"{name}: {error}") from error


def _require_finite(loss: Tensor, model: str, name: str) -> None:
    if not loss.isfinite():
        raise UsageError(
            f"{name}: it is {loss.item()} before the first step; check the initial weights of "
            f"{model}, the data, and the loss (train.on_nonfinite_loss = 'continue' trains on)"
        )


def _require_gradients(model: nn.Module, name: str, reproducible: bool) -> None:
    for key, parameter in model.named_parameters():
        if reproducible and parameter.grad is not None and parameter.grad.is_sparse:
            raise UsageError(
                f"{name}: the gradient of {key} is sparse: set sparse=False, or "
                "train.reproducible = false"
            )


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if value is None:
        return "None"
    return f"a {type(value).__name__}"


@contextmanager
def preserved(trainer: Trainer) -> Iterator[None]:
    """Restore, bit for bit, what forward and backward passes change."""
    model = trainer.model
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    devices = {p.device for p in model.parameters() if p.is_cuda}
    device_states = [(device, torch.cuda.get_rng_state(device)) for device in devices]
    attributes = [(module, _plain(module)) for module in model.modules()]
    parameters = [(p, p.detach().clone(), p.grad) for p in model.parameters()]
    try:
        yield
    finally:
        trainer.run.engine.buffers.restore()
        with torch.no_grad():
            for parameter, value, gradient in parameters:
                parameter.grad = gradient
                if not torch.equal(parameter, value):  # changed by the model itself
                    parameter.copy_(value)
        for module, plain in attributes:
            for key, value in plain.items():
                if vars(module).get(key) is not value:
                    vars(module)[key] = value
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
        for device, state in device_states:
            torch.cuda.set_rng_state(state, device)


def _plain(module: nn.Module) -> dict[str, Any]:
    """The module's attributes that are numbers, text or None, its training flag among them."""
    kinds = (bool, int, float, str, type(None))
    return {key: value for key, value in vars(module).items() if isinstance(value, kinds)}
