"""Which layers compute in bfloat16, from the curvature of the loss in them.

"Precision from the Hessian" (the ABSA talk), decided like the batch: at each decision point. If the
weights W of a layer are rounded to bfloat16, the loss changes by about

    r = |c| / 2 · ‖bf16(W) − W‖²

where c is the mean eigenvalue of the layer's block of the Hessian (this is Ω / 2 of HAWQ,
arXiv:1911.03852), or its top one, for the largest rise by any change of that size. The layers with
the smallest r compute in bfloat16, as many as together stay below the limit of the job. Rounding of
their inputs and outputs is not part of r.

The layers are in the checkpoint, in the group `state`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hpc_absa.training.layer_curvature import LayerCurvature, Measure

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def least_sensitive(changes: Mapping[str, float], limit: float) -> tuple[str, ...]:
    """The layers of the smallest changes, at most `limit` together; none if one is not finite."""
    if not all(map(math.isfinite, changes.values())):
        return ()
    chosen, total = list[str](), 0.0
    for name in sorted(changes, key=lambda name: changes[name]):
        total += changes[name]
        if total > limit:
            break
        chosen.append(name)
    return tuple(chosen)


class LayerPrecision:
    """Chooses the layers that compute in bfloat16, and lets them."""

    def __init__(self, curvature: LayerCurvature, measure: Measure, limit: float) -> None:
        """
        Args:
            curvature: of the model whose linear layers and convolutions are chosen from.
            measure: c.
            limit: of r, of all chosen layers together.
        """
        self._curvature, self.measure, self.limit = curvature, measure, limit
        model = curvature.model
        names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        self._layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, LAYERS) and id(module.weight) in names and not _unused(module)
        }
        self._weights = {name: names[id(layer.weight)] for name, layer in self._layers.items()}
        self._choose(())

    def update(self, seed: int) -> dict[str, Any]:
        """Choose the layers (a collective); returns the fields of the event."""
        found = self._curvature.of(self.measure, seed)
        changes = {
            name: _change(found[self._weights[name]], layer.weight)
            for name, layer in self._layers.items()
        }
        self._choose(least_sensitive(changes, self.limit))
        total = sum(changes[name] for name in self.chosen)
        reason = (
            f"{len(self.chosen)} of {len(changes)} layers in bfloat16: predicted to change the "
            f"loss by {total:.2g}, at most {self.limit:g}"
        )
        return {
            "measure": self.measure,
            "limit": self.limit,
            "changes": {name: r if math.isfinite(r) else None for name, r in changes.items()},
            "bfloat16": list(self.chosen),
            "reason": reason,
        }

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Within it the chosen layers compute in bfloat16; their outputs are float32 again."""
        for layer, forward in self._forwards:
            layer.forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer, _ in self._forwards:
                del layer.forward

    def _choose(self, names: Iterable[str]) -> None:
        self.chosen = tuple(names)
        """Names of the layers in bfloat16; none before the first decision point."""
        layers = [self._layers[name] for name in self.chosen]
        self._forwards = [(layer, _in_bfloat16(layer)) for layer in layers]

    def state_dict(self) -> dict[str, Any]:
        return {"bfloat16": list(self.chosen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._choose(state["bfloat16"])


def _in_bfloat16(layer: nn.Module) -> Any:
    plain, weight = layer.forward, layer.weight
    assert isinstance(weight, Tensor)

    def forward(inputs: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, torch.bfloat16):
            output: Tensor = plain(inputs)
        return output.to(weight.dtype)

    return forward


def _change(curvature: float, weight: Any) -> float:
    rounding = weight.detach().bfloat16().double() - weight.detach().double()
    return abs(curvature) / 2 * float(rounding.square().sum())


def _unused(module: nn.Module) -> bool:
    """Its forward pass is another's: the weight in `nn.MultiheadAttention`, or an own one."""
    return "forward" in vars(module) or isinstance(
        module, nn.modules.linear.NonDynamicallyQuantizableLinear
    )
