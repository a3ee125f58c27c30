"""The estimate over 1, 2 and 4 real MPI ranks: the same value, that of the dense Hessian."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature.estimate import estimate_eigenvalue
from hpc_absa.curvature.export import to_dict
from hpc_absa.curvature.spectrum import spectrum
from tests.curvature.nets import build, dense
from tests.mpi import curvature_program

PROGRAM = Path(curvature_program.__file__)
KINDS = ["conv", "attention", "mlp"]

pytestmark = pytest.mark.mpi


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """As on each rank: sums within a kernel depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_gets_the_same_estimate(mpirun, ranks):
    """22 samples in microbatches of 8 make 3: one of 4 ranks has none."""
    lines = mpirun(ranks, PROGRAM, *KINDS, timeout=120).stdout.splitlines()
    answer = json.loads(next(line for line in lines if line.startswith("{")))
    assert answer["size"] == ranks
    _check_spectrum(answer["results"].pop("spectrum"))
    for kind, bits in answer["results"].pop("bits").items():
        assert bits == curvature_program.bits(kind, SerialCommunicator()), kind
    for kind in KINDS:
        result = answer["results"][kind]
        model, loss, sample = build(kind, dtype=torch.float32)
        serial = estimate_eigenvalue(
            model, loss, sample, SerialCommunicator(),
            method="lanczos", samples=22, microbatch=8, tol=1e-3, max_iter=40,
        )  # fmt: skip
        truth = torch.linalg.eigvalsh(dense(model, loss, sample, 22))[-1]
        assert result["same"], "ranks differ"
        assert result["converged"]
        assert result["value"] == pytest.approx(float(truth), rel=1e-3)
        assert result["value"] == pytest.approx(serial.eigenvalue.value, rel=1e-6)
        assert result["sampling_error"] == pytest.approx(serial.sampling_error, rel=1e-4)
        cosine = float(torch.tensor(result["vector"]) @ serial.vector)
        assert cosine == pytest.approx(1, abs=1e-5)


def _check_spectrum(result):
    model, loss, sample = build("mlp", dtype=torch.float64)
    serial = spectrum(
        model, loss, sample, SerialCommunicator(), samples=22, microbatch=8, k=2, max_iter=40,
        trace_matvecs=9, density_steps=8, density_probes=2, slice_points=3,
    )  # fmt: skip
    expected = to_dict(serial)
    assert result["same"]
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-12)
    assert result["top"]["values"] == pytest.approx(expected["top"]["values"], rel=1e-9)
    assert result["trace"]["value"] == pytest.approx(expected["trace"]["value"], rel=1e-9)
    assert result["density"]["density"] == pytest.approx(
        expected["density"]["density"], rel=1e-6, abs=1e-9
    )
