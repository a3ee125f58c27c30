"""On a GPU: the same eigenvalue as in host memory, and no trace left behind."""

import pytest
import torch

from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature.probe import estimate
from hpc_absa.curvature.spectrum import spectrum
from tests.curvature.nets import Samples, build, dense

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.mark.parametrize("kind", ["conv", "attention", "mlp"])
def test_agrees_with_the_dense_hessian_and_leaves_no_trace(kind):
    model, loss, sample = build(kind, dtype=torch.float32)
    truth = float(torch.linalg.eigvalsh(dense(model, loss, sample, 20))[-1])
    model.cuda()
    sample = Samples(sample.inputs.cuda(), sample.targets.cuda())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.cuda.get_rng_state()
    found = estimate(
        model, loss, sample, SerialCommunicator(),
        method="lanczos", samples=20, microbatch=6, tol=1e-4, max_iter=40,
    )  # fmt: skip
    assert found.eigenvalue.converged
    assert found.eigenvalue.value == pytest.approx(truth, rel=1e-3)  # convolutions may use TF32
    assert found.vector.device.type == "cuda"
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_spectrum_is_that_of_the_dense_hessian():
    model, loss, sample = build("mlp", dtype=torch.float64)
    values = torch.linalg.eigvalsh(dense(model, loss, sample, 24))
    model.cuda()
    sample = Samples(sample.inputs.cuda(), sample.targets.cuda())
    found = spectrum(
        model, loss, sample, SerialCommunicator(), samples=24, microbatch=6, k=3, tol=1e-6
    )
    assert found.top.values[:3] == pytest.approx(values.flip(0)[:3].tolist(), rel=1e-5)
