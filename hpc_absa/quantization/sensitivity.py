"""HAWQ's sensitivity of each layer: `Ω(b) = Tr(H) / n · ‖Q_b(W) − W‖²` (arXiv:1911.03852)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hpc_absa.comm import Communicator
from hpc_absa.curvature.operator import HessianOperator, HessianSample, Loss, evaluation_mode
from hpc_absa.curvature.stochastic import Trace, hutchpp_trace
from hpc_absa.quantization.allocation import Floats
from hpc_absa.quantization.fake import squared_error
from hpc_absa.quantization.graph import Layer


@dataclass(frozen=True)
class Sensitivity:
    """Of one layer."""

    layer: Layer
    trace: Trace
    """Of the layer's diagonal block of the Hessian of the mean loss."""
    errors: Floats
    """[K], `‖Q_b(W) − W‖²` for each choice of bits."""

    @property
    def omega(self) -> Floats:
        """[K], Ω. A trace below zero, which noise or a saddle can give, counts as zero."""
        return max(self.trace.value, 0.0) / self.layer.parameters * self.errors


def sensitivities(
    model: nn.Module,
    loss_fn: Loss,
    sample: HessianSample,
    comm: Communicator,
    layers: Sequence[Layer],
    bits: Sequence[int],
    *,
    microbatch: int,
    matvecs: int = 12,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Sensitivity]:
    """Of every layer, the same on all ranks (a collective); the model is left as it was.

    The traces are of the model's own weights, before batch norm is folded into them: a symmetric
    quantization of each channel rounds W and its folded multiple in the same way.

    Args:
        model: whose modules have the names of `layers`.
        loss_fn: mean loss of a microbatch.
        sample: training samples; all of them are used.
        comm: communicator.
        layers: of the model.
        bits: K choices.
        microbatch: samples differentiated at a time.
        matvecs: products for the trace of each layer, at least 6, a third of them for the sketch.
        progress: called with the name of each layer.
    """
    found = []
    with evaluation_mode(model):
        for layer in layers:
            progress(layer.name)
            weight = model.get_submodule(layer.name).weight
            assert isinstance(weight, Tensor)
            trained = weight.requires_grad
            weight.requires_grad_()  # frozen layers are quantized as well
            try:
                operator = HessianOperator(
                    model, loss_fn, sample, comm, samples=sample.size, microbatch=microbatch,
                    names=[_parameter_name(model, weight)],
                )  # fmt: skip
                like = torch.zeros(operator.size, dtype=operator.dtype, device=operator.device)
                trace = hutchpp_trace(
                    operator.matvec, like, matvecs=matvecs, broadcast=comm.broadcast_
                )
                operator.close()
            finally:
                weight.requires_grad_(trained)
            errors = np.array([squared_error(weight.detach(), b) for b in bits])
            found.append(Sensitivity(layer, trace, errors))
    return found


def _parameter_name(model: nn.Module, weight: Tensor) -> str:
    """The first name of a weight, which may be shared."""
    return next(name for name, parameter in model.named_parameters() if parameter is weight)
