"""Looking at a model without leaving a trace in it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def observed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and on leaving (also by an exception) everything as it was, bit for bit.

    Restored are the modules' training flags and the random states of Python, NumPy and torch.
    Parameters, buffers and `.grad` need no restoring: the functions here run the model on tensors
    of their own (`torch.func.functional_call`).

    Inside, attention runs through the one kernel that can be differentiated twice, and recurrent
    layers around cuDNN, which cannot differentiate them in evaluation mode.
    """
    flags = [(module, module.training) for module in model.modules()]
    python, numpy_ = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=_cuda_devices(model)))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.enable_grad())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        try:
            for module, _ in flags:
                module.training = False
            yield
        finally:
            for module, training in flags:
                module.training = training
            random.setstate(python)
            np.random.set_state(numpy_)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require grad, by name, in `model.parameters()` order; tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
