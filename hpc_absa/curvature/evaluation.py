"""How a model runs while it is differentiated twice."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hpc_absa.curvature import twice

TF32_TOLERANCE = 2e-3
"""For a smaller tolerance, convolutions on a GPU do not use TensorFloat-32: with it, 8 of 24
estimates were outside 1e-4, and none outside 1e-3. Without it, a ResNet-18 takes 2.4 times as long.
"""


@contextmanager
def evaluation_mode(model: nn.Module, tol: float = math.inf) -> Iterator[None]:
    """Evaluation mode; on exit the training flags and all random states are restored bit for bit.

    Random states are those of Python, NumPy and torch. Parameters, buffers and `.grad` need no
    restoring, because `fast.forward` runs the model on copies. Attributes that modules set while
    they run, as weight normalization does, are restored.

    With a relative error `tol` below `TF32_TOLERANCE`, convolutions on a GPU do not use
    TensorFloat-32, with which products are accurate to 1e-3 only. Attention uses the only kernel
    that can be differentiated twice. Recurrent layers do not use cuDNN, which cannot differentiate
    them in evaluation mode. Activation checkpointing, `torch.compile` (`twice.plain_autograd`) and
    autocast are disabled.
    """
    flags = [(module, module.training) for module in model.modules()]
    attributes = [
        (vars(module), dict(vars(module)))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    python, numpy_ = random.getstate(), np.random.get_state()
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(twice.plain_autograd())
        for kind in {p.device.type for p in model.parameters()}:  # a script may train within it
            stack.enter_context(torch.autocast(kind, enabled=False))
        if tol < TF32_TOLERANCE:
            stack.enter_context(_without_tf32())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        try:
            for module, _ in flags:
                module.training = False
            yield
        finally:
            for present, before in attributes:
                for key in present.keys() - before.keys():
                    del present[key]
                present.update(before)
            for module, training in flags:
                module.training = training
            random.setstate(python)
            np.random.set_state(numpy_)


@contextmanager
def _without_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
