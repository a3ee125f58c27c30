"""`torch.optim.SGD` without importing torch's compiler, which would add 1.2 s to every start.

torch's optimizers import the compiler only to exclude themselves from compilation. With a version
of torch that does so in another way than 2.13, the compiler is imported as usual.
"""

from __future__ import annotations

import inspect

import torch

for _method in vars(torch.optim.Optimizer).values():
    _plain = getattr(_method, "__wrapped__", None)
    if _plain is not None and not hasattr(_plain, "__dynamo_disable"):
        _plain.__dynamo_disable = _plain


class SGD(torch.optim.SGD):
    """The same arithmetic, bit for bit."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))
    """Without the decorator for `differentiable` and for the compiler."""
