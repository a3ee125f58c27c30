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
from torch import Tensor, nn

from hpc_absa.adversarial.fgsm import perturb
from hpc_absa.curvature.check import check_curvature
from hpc_absa.curvature.loss import split
from hpc_absa.curvature.twice import CurvatureError
from hpc_absa.errors import CollectiveError, ExitStatus, UsageError
from hpc_absa.plugins import user_code
from hpc_absa.training.evaluate import CROSS_ENTROPY, require_scores
from hpc_absa.training.state import load_model, to_array

if TYPE_CHECKING:
    from hpc_absa.training.trainer import Trainer


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
    inputs, targets = trainer.loader.sample(np.arange(b) * len(dataset.train) // b)
    with preserved(trainer):
        for parameter in model.parameters():
            parameter.grad = None
        _require_real(model, model_name)
        with user_code(f"{model_name}: its forward pass in training mode"):
            with trainer.autocast(inputs):
                outputs = model(inputs.clone())
            if trainer.bfloat16:
                outputs = outputs.float()
        if loss_name == CROSS_ENTROPY:
            require_scores(outputs, b, len(dataset.classes), model_name, loss_name)
        with user_code(f"{loss_name}: called with {_shape(outputs)} and targets [{b}]"):
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
        _rehearse_evaluation(trainer, inputs, targets)
        if trainer.adversary and run.adversarial_fraction:
            with user_code(f"{model_name}: the gradient by its inputs, for adversarial examples"):
                adversary = trainer.adversary
                perturb(model, trainer.loss, inputs, targets, adversary.step, adversary.valid)
        if run.rule.wants_eigenvalue(progress.schedule):
            _rehearse_hessian(trainer, inputs, targets)
        run.engine.buffers.restore()
        _rehearse_checkpoint(trainer)


def _rehearse_evaluation(trainer: Trainer, inputs: Tensor, targets: Tensor) -> None:
    model, (model_name, loss_name) = trainer.model, trainer.names
    model.eval()
    with torch.no_grad():
        with user_code(f"{model_name}: its forward pass in evaluation mode"):
            outputs = model(inputs.clone())
        require_scores(
            outputs, len(inputs), len(trainer.loader.dataset.classes), model_name, trainer.names[1]
        )
        with user_code(f"{loss_name}: called in evaluation with {_shape(outputs)}"):
            trainer.loss(outputs, targets)


def _rehearse_hessian(trainer: Trainer, inputs: Tensor, targets: Tensor) -> None:
    hint = (
        "the Hessian needs a model and a loss that can be differentiated twice, which compiled or "
        "scripted models and sparse gradients cannot; or choose schedule.method = 'bl', 'fb', 'gg' "
        "or 'gns'"
    )
    with user_code(f"{trainer.names[0]}: its Hessian, which the schedule needs", hint):
        sample = _Sample(inputs, targets)
        check_curvature(trainer.model, trainer.loss, sample, microbatch=sample.size)


class _Sample:
    """One microbatch as the sample of a Hessian."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets, self.size = inputs, targets, len(inputs)

    def load(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self.inputs[start:stop].clone(), self.targets[start:stop]


def _rehearse_checkpoint(trainer: Trainer) -> None:
    """The model's state as arrays, and back."""
    name, state = trainer.names[0], trainer.model.state_dict()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise UsageError(
                f"{name}: {key} is of type {type(value).__name__}; checkpoints contain tensors "
                "only: return a tensor from get_extra_state"
            )
    with user_code(f"{name}: saving and loading its state_dict"):
        load_model(trainer.model, {k: to_array(v) for k, v in state.items()}, "the rehearsal")


def _require_real(model: nn.Module, name: str) -> None:
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.is_floating_point():
            raise UsageError(
                f"{name}: the parameter {key} is {parameter.dtype}, expected real numbers: keep a "
                "complex one as torch.view_as_real of it"
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
