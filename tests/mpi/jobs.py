"""A job small enough to run many times: digits, 4 epochs, growing twice."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from hpc_absa.rundir import RunDir
from hpc_absa.rundir.paths import checkpoint_files

SMALL = """
name = "small"
[data]
name = "digits"
[model]
name = "digits-cnn"
width = 4
[train]
epochs = 4
microbatch = 32
lr = 0.05
threads_per_rank = 1
reproducible = {reproducible}
[schedule]
method = "absa"
base_batch = 32
max_batch = 128
kappa = 1
[hessian]
samples = 128
tol = 0.1
{hessian}
[ranks]
initial = {initial}
max = {most}
"""
"""With kappa = 1 the batch is 32, 64 and 128 in the first three epochs, whatever the eigenvalue."""


def write_job(
    folder: Path,
    *,
    initial: int = 1,
    most: int = 4,
    reproducible: bool = False,
    hessian: str = "",
) -> Path:
    """The small job as a file; returns its path."""
    path = folder / "small.toml"
    text = SMALL.format(initial=initial, most=most, reproducible=str(reproducible).lower(),
                        hessian=hessian)  # fmt: skip
    path.write_text(text, encoding="utf-8")
    return path


def final_weights(run: Path) -> np.ndarray:
    """All parameters and statistics of the newest checkpoint as one vector."""
    with h5py.File(checkpoint_files(RunDir(run).checkpoints)[-1]) as file:
        return np.concatenate([file["model"][name][()].ravel() for name in sorted(file["model"])])


def relative_difference(one: np.ndarray, other: np.ndarray) -> float:
    """Of two weight vectors."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(one))
