"""Small versions of the examples' models with a few batches, and their dense Hessians."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("plain", "language_model", "tabular", "multilabel", "finetune")


def small(name: str):
    """A model in evaluation mode and float64, its loss, and batches of different sizes."""
    script = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    torch.manual_seed(1)
    match name:
        case "plain":
            (inputs, targets), sizes = script["digits"]()[0][:22], (8, 8, 6)
            model, loss = script["network"](width=1), nn.CrossEntropyLoss()
        case "language_model":
            lines = script["text"](7)
            model, loss = script["LanguageModel"](width=4, layers=1), script["loss_fn"]
            batches = [script["collate"](lines[:4]), script["collate"](lines[4:])]
        case "tabular":
            (inputs, targets), sizes = script["table"](22, seed=3), (8, 8, 6)
            model, loss = script["network"](width=5), nn.MSELoss()
        case "multilabel":
            inputs, targets = script["collate"](
                [script["Shapes"](22, seed=3)[i] for i in range(22)]
            )
            sizes = (8, 8, 6)
            model, loss = script["network"](width=2), nn.BCEWithLogitsLoss()
        case "finetune":
            inputs, targets = (t[:22] for t in script["digits"](range(5, 10)))
            sizes = (8, 8, 6)
            model, loss = script["network"](width=12), nn.CrossEntropyLoss()
            script["freeze"](model[0])
    if name != "language_model":
        batches = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
    model = model.double().eval()
    batches = [
        tuple(t.double() if t.is_floating_point() else t for t in batch) for batch in batches
    ]
    return model, loss, batches


def dense_hessian(model, loss, batches) -> np.ndarray:
    """`∇²` of the mean loss over all samples, or over all tokens, [P, P] float64."""
    trainable = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in trainable.values()]

    def total(flat):
        parts = flat.split(sizes)
        values = {n: part.view_as(p) for (n, p), part in zip(trainable.items(), parts, strict=True)}
        sums, count = 0.0, 0.0
        for inputs, targets in batches:
            result = loss(functional_call(model, values, (inputs,)), targets)
            if not isinstance(result, tuple):
                result = result * len(targets), len(targets)
            sums, count = sums + result[0], count + result[1]
        return sums / count

    flat = torch.cat([p.reshape(-1) for p in trainable.values()])
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(total, flat).numpy()
