"""Optimizers by name: torch's SGD and AdamW, LARS and LAMB, and the user's.

torch's optimizers import torch's compiler only to exclude themselves from compilation, which would
add 1.2 s to every start. The classes here do not. With a version of torch that does so in another
way than 2.13, the compiler is imported as usual.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hpc_absa import plugins
from hpc_absa.config import Train
from hpc_absa.errors import UsageError
from hpc_absa.training.adahessian import AdaHessian

for _method in vars(torch.optim.Optimizer).values():
    _plain = getattr(_method, "__wrapped__", None)
    if _plain is not None and not hasattr(_plain, "__dynamo_disable"):
        _plain.__dynamo_disable = _plain

Groups = list[dict[str, Any]]
"""Parameter groups, as torch's optimizers take them."""


class SGD(torch.optim.SGD):
    """The same arithmetic, bit for bit."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))
    """Without the decorator for `differentiable` and for the compiler."""


class AdamW(torch.optim.AdamW):
    """As `SGD`, of torch's AdamW."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv:1708.03888, algorithm 1).

    `v ← m v + γ λ (g + β w)`, `w ← w − v`, with the local rate `λ = η ‖w‖ / (‖g‖ + β ‖w‖)` of each
    weight. Vectors (biases, normalizations) have λ = 1, as do weights and gradients that are zero.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        """
        Args:
            params: parameters or groups of them.
            lr: γ.
            momentum: m.
            weight_decay: β.
            trust_coefficient: η.
        """
        _require(0 <= momentum < 1, "momentum", momentum, "from 0 to below 1")
        _require(trust_coefficient > 0, "trust_coefficient", trust_coefficient, "above 0")
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust_coefficient": trust_coefficient,
            },
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for parameter, gradient, group in _with_gradients(self):
            decay, rate = group["weight_decay"], group["lr"]
            update = gradient.add(parameter, alpha=decay) if decay else gradient.clone()
            if parameter.dim() > 1:
                size, slope = _norm(parameter), _norm(gradient)
                local = group["trust_coefficient"] * size / (slope + decay * size)
                update *= torch.where((size > 0) & (slope > 0), local, 1.0)
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            velocity = state["momentum_buffer"]
            velocity.mul_(group["momentum"]).add_(update, alpha=rate)
            parameter -= velocity


class LAMB(torch.optim.Optimizer):
    """LAMB (You et al., arXiv:1904.00962, algorithm 2, with φ the identity).

    Adam's direction `r = m̂ / (√v̂ + ε)` with decoupled weight decay, scaled for each weight by
    `‖w‖ / ‖r + λ w‖`: `w ← w − η · ‖w‖ / ‖r + λ w‖ · (r + λ w)`. The ratio is 1 for vectors
    (biases, normalizations), and where a norm is zero.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        """
        Args:
            params: parameters or groups of them.
            lr: η.
            betas: of the running means m and v.
            eps: ε.
            weight_decay: λ.
        """
        for beta in betas:
            _require(0 <= beta < 1, "betas", list(betas), "two numbers from 0 to below 1")
        _require(eps >= 0, "eps", eps, "0 or more")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for parameter, gradient, group in _with_gradients(self):
            state, (beta1, beta2) = self.state[parameter], group["betas"]
            if not state:
                state["step"] = torch.zeros(())  # on the CPU, as torch's
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] += 1
            mean, square, step = state["exp_avg"], state["exp_avg_sq"], state["step"].item()
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            denominator = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
            update = mean / (1 - beta1**step) / denominator
            update.add_(parameter, alpha=group["weight_decay"])
            if parameter.dim() > 1:
                size, length = _norm(parameter), _norm(update)
                update *= torch.where((size > 0) & (length > 0), size / length, 1.0)
            parameter.add_(update, alpha=-group["lr"])


BUILT_IN: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": SGD,
    "adamw": AdamW,
    "lars": LARS,
    "lamb": LAMB,
    "adahessian": AdaHessian,
}


def build(
    train: Train, arguments: Mapping[str, Any], model: nn.Module, *, lr: float
) -> torch.optim.Optimizer:
    """The optimizer that `train.optimizer` names, of the trainable parameters.

    Args:
        train: the job's table.
        arguments: the job's `[optimizer]` table.
        model: on its device.
        lr: learning rate of all groups, which the schedule changes.

    Raises:
        UsageError: arguments that it does not have or refuses.
    """
    name = train.optimizer
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()}
    if train.momentum is not None:
        given["momentum"] = train.momentum
    groups = parameter_groups(train, model)
    function = BUILT_IN.get(name) or plugins.resolve(name, "train.optimizer")
    taken = _parameters(function)
    if taken and "weight_decay" not in taken:  # groups may have keys that no default has
        if train.weight_decay:
            raise UsageError(
                f"train.weight_decay = {train.weight_decay:g}: expected 0, because {name} has none"
            )
        groups = [{"params": [p for group in groups for p in group["params"]]}]
    own = {"params", "lr", "weight_decay"}
    if unknown := [key for key in given if (taken and key not in taken) or key in own]:
        key = "train.momentum" if unknown[0] == "momentum" else f"optimizer.{unknown[0]}"
        raise UsageError(
            f"{key} = {given[unknown[0]]!r}: {name} has no such argument here; "
            f"{plugins.valid_ones(taken - own)}"
        )
    with plugins.user_code(f"train.optimizer = {name!r}"):
        optimizer = function(groups, lr=lr, **given)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(
            f"train.optimizer = {name!r}: made a {type(optimizer).__name__}, expected a "
            "torch.optim.Optimizer"
        )
    require_no_closure(f"train.optimizer = {name!r}", optimizer)
    return optimizer


def require_no_closure(origin: str, optimizer: torch.optim.Optimizer) -> None:
    """
    Raises:
        UsageError: its step evaluates the loss again, as that of LBFGS; begins with `origin`.
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UsageError(
            f"{origin}: its step needs a closure, expected an optimizer that takes one gradient "
            "for each step"
        )


def parameter_groups(train: Train, model: nn.Module) -> Groups:
    """The parameters with their weight decay; those of normalizations and biases are vectors."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    skipped = [p for p in parameters if p.dim() < 2 and train.no_decay_norm_bias]
    decayed = [p for p in parameters if p.dim() >= 2 or not train.no_decay_norm_bias]
    groups = [(decayed, train.weight_decay), (skipped, 0.0)]
    return [{"params": some, "weight_decay": decay} for some, decay in groups if some]


def _parameters(function: Callable[..., Any]) -> set[str]:
    """Names of its arguments; empty if it takes any or has no signature."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return set()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return set()
    return {p.name for p in parameters}


def _with_gradients(
    optimizer: torch.optim.Optimizer,
) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                gradient = parameter.grad
                yield parameter, gradient.to_dense() if gradient.is_sparse else gradient, group


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor)


def _require(condition: bool, key: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{key} = {value}: expected {expected}")
