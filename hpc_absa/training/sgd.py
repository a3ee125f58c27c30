"""`torch.optim.SGD` without the import of torch's compiler, which takes 1.2 s of every start.

torch's optimizers import it only to tell it to leave them alone. Where a version of torch does so
in another way than 2.13, the compiler is imported as ever.
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
    """What is left out around it is `differentiable`, and the word to the compiler."""
