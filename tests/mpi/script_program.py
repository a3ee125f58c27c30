"""A user's script on several ranks: the spectra of the examples' models, then a run.

usage: script_program.py FOLDER
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

import hpc_absa as absa
from tests.curvature.examples import NAMES, small

SAMPLES = 52


def spectra(comm):
    """Top eigenvalue, trace and Ritz values of each example's model."""
    found = {}
    for name in NAMES:
        model, loss, batches = small(name)
        top = absa.top_eigenvalue(model, loss, batches, tol=1e-6, max_iter=100, comm=comm)
        result = absa.spectrum(
            model, loss, batches, k=1, trace_matvecs=9, density_steps=4, density_probes=1,
            layers=False, slice_points=0, comm=comm,
        )  # fmt: skip
        found[name] = [top.value, result.trace.value, *result.density.nodes.ravel().tolist()]
    return found


def train(folder):
    """With other initial weights on each rank, and a loss whose denominators differ."""
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(SAMPLES, 3, generator=generator), torch.arange(SAMPLES) % 3 - 1
    targets[targets < 0] = -100
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 2))
    loss_fn = nn.CrossEntropyLoss(reduction="sum")

    def total(outputs, labels):
        return loss_fn(outputs, labels), (labels >= 0).sum()

    with absa.Run(
        folder,
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        schedule=absa.ABS(base_batch=8, max_batch=16, kappa=1),
        epochs=2,
        microbatch=4,
        loss=total,
        dataset=list(zip(inputs, targets, strict=True)),
        evaluate=lambda: run.sum(total(model(inputs), targets)[0]) / run.size,
        reproducible=True,
        hessian={"samples": 16, "max_iter": 3},
    ) as run:
        for step in run:
            for batch, labels in step.batches:
                step.backward(total(model(batch), labels))
            step.optimize()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = spectra("world")
    train(folder / "run")
    if int(os.environ.get("OMPI_COMM_WORLD_RANK", "0")) == 0:
        (folder / "spectra.json").write_text(json.dumps(found))
