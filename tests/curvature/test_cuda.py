"""On a GPU: the eigenvalues of the dense Hessian, and nothing in the model changed."""

import pytest
import torch

from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature.estimate import estimate_eigenvalue
from hpc_absa.curvature.spectrum import spectrum
from tests.curvature.nets import Samples, build, dense

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("kind", ["conv", "attention", "mlp"])
def test_estimate(kind):
    model, loss, sample = build(kind, dtype=torch.float32)
    top = float(torch.linalg.eigvalsh(dense(model, loss, sample, 20))[-1])
    model.cuda()
    sample = Samples(sample.inputs.cuda(), sample.targets.cuda())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.cuda.get_rng_state()
    result = estimate_eigenvalue(
        model, loss, sample, SerialCommunicator(),
        method="lanczos", samples=20, microbatch=6, tol=1e-4, max_iter=40,
    )  # fmt: skip
    assert result.eigenvalue.converged
    assert result.eigenvalue.value == pytest.approx(top, rel=1e-3)  # convolutions may use TF32
    assert result.vector.device.type == "cuda"
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_spectrum():
    model, loss, sample = build("mlp", dtype=torch.float64)
    values = torch.linalg.eigvalsh(dense(model, loss, sample, 24))
    model.cuda()
    sample = Samples(sample.inputs.cuda(), sample.targets.cuda())
    result = spectrum(
        model, loss, sample, SerialCommunicator(), samples=24, microbatch=6, k=3, tol=1e-6
    )
    assert result.top.values[:3] == pytest.approx(values.flip(0)[:3].tolist(), rel=1e-5)
