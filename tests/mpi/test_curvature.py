"""The estimate over 1, 2 and 4 real MPI ranks: one value, the dense Hessian's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature.probe import estimate
from tests.curvature.nets import build, dense

PROGRAM = Path(__file__).parent / "curvature_program.py"
KINDS = ["conv", "attention", "mlp"]

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_world_finds_the_same(mpirun, ranks):
    """22 samples in microbatches of 8 make 3: with 4 ranks one has nothing to do."""
    lines = mpirun(ranks, PROGRAM, *KINDS, timeout=120).stdout.splitlines()
    answer = json.loads(next(line for line in lines if line.startswith("{")))
    assert answer["size"] == ranks
    for kind in KINDS:
        found = answer["found"][kind]
        model, loss, sample = build(kind, dtype=torch.float32)
        alone = estimate(
            model, loss, sample, SerialCommunicator(),
            method="lanczos", samples=22, microbatch=8, tol=1e-3, max_iter=40,
        )  # fmt: skip
        truth = torch.linalg.eigvalsh(dense(model, loss, sample, 22))[-1]
        assert found["same"], "ranks differ"
        assert found["converged"]
        assert found["value"] == pytest.approx(float(truth), rel=1e-3)
        assert found["value"] == pytest.approx(alone.eigenvalue.value, rel=1e-6)
        assert found["sampling_error"] == pytest.approx(alone.sampling_error, rel=1e-4)
        cosine = float(torch.tensor(found["vector"]) @ alone.vector)
        assert cosine == pytest.approx(1, abs=1e-5)
