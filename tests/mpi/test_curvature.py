"""The estimate over 1, 2 and 4 real MPI ranks: one value, the dense Hessian's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature.estimate import estimate_eigenvalue
from hpc_absa.curvature.export import to_dict
from hpc_absa.curvature.spectrum import spectrum
from tests.curvature.architectures import LanguageModel, distributed
from tests.curvature.nets import autograd_hessian, build, dense
from tests.mpi import curvature_program

PROGRAM = Path(curvature_program.__file__)
KINDS = ["conv", "attention", "mlp", "recurrent", "weighted"]

pytestmark = pytest.mark.mpi


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """As each rank has: a kernel's own sums depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_world_finds_the_same(mpirun, ranks):
    """22 samples in microbatches of 8 make 3: with 4 ranks one has nothing to do."""
    lines = mpirun(ranks, PROGRAM, *KINDS, timeout=120).stdout.splitlines()
    answer = json.loads(next(line for line in lines if line.startswith("{")))
    assert answer["size"] == ranks
    (refusal,) = answer["refusals"]
    assert "not a mean over samples" in refusal
    _check_spectrum(answer["found"].pop("spectrum"))
    for kind, product in answer["found"].pop("architectures").items():
        model, loss, sample = distributed(kind, 22)
        ones = torch.ones(1, len(product)).double()
        if kind == "language":
            loss = LanguageModel.loss
        (expected,) = autograd_hessian(model, loss, sample, 22, vectors=ones)
        found = torch.tensor(product, dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    for kind, bits in answer["found"].pop("bits").items():
        assert bits == curvature_program.bits(kind, SerialCommunicator()), kind
    for name, values in answer["found"].pop("stratified").items():
        (found,) = values  # of all ranks
        alone = curvature_program.stratified(name, SerialCommunicator())
        if name == "reproducible":
            assert found == alone
        assert found == pytest.approx(alone, rel=1e-4, abs=1e-5)
    for kind in KINDS:
        found = answer["found"][kind]
        model, loss, sample = build(kind, dtype=torch.float32)
        alone = estimate_eigenvalue(
            model, loss, sample, SerialCommunicator(),
            method="lanczos", samples=22, microbatch=8, tol=1e-3, max_iter=40, threshold=1e6,
        )  # fmt: skip
        truth = torch.linalg.eigvalsh(dense(model, loss, sample, 22))[-1]
        assert found["same"], "ranks differ"
        assert found["converged"]
        assert found["value"] == pytest.approx(float(truth), rel=1e-3)
        assert found["value"] == pytest.approx(alone.eigenvalue.value, rel=1e-6)
        for name in ("sampling_error", "upper_bound"):
            assert found[name] == pytest.approx(getattr(alone.eigenvalue, name), rel=1e-4)
        cosine = float(torch.tensor(found["vector"]) @ alone.vector)
        assert cosine == pytest.approx(1, abs=1e-5)


def _check_spectrum(found):
    model, loss, sample = build("mlp", dtype=torch.float64)
    alone = spectrum(
        model, loss, sample, SerialCommunicator(), samples=22, microbatch=8, k=2, max_iter=40,
        trace_matvecs=9, density_steps=8, density_probes=2, slice_points=3,
    )  # fmt: skip
    expected = to_dict(alone)
    assert found["same"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-12)
    assert found["top"]["values"] == pytest.approx(expected["top"]["values"], rel=1e-9)
    assert found["trace"]["value"] == pytest.approx(expected["trace"]["value"], rel=1e-9)
    assert found["density"]["density"] == pytest.approx(
        expected["density"]["density"], rel=1e-6, abs=1e-9
    )
