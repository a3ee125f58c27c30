"""The Hessian of a trained ResNet-20 over 200 images, against PyHessian's numbers for it."""

import numpy as np
import pytest

from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature.spectrum import spectrum
from tests import shared_data

EIGENVALUES = [2215.76, 1487.99]
TRACE, TRACE_ERROR = 14855, 375


class Sample:
    def __init__(self, inputs, targets):
        self.inputs, self.targets, self.size = inputs, targets, len(targets)

    def load(self, start, stop):
        return self.inputs[start:stop], self.targets[start:stop]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_spectrum_is_pyhessians():
    from torch.nn.functional import cross_entropy

    model = shared_data.trained_resnet20()
    sample = Sample(*shared_data.images(50))
    found = spectrum(
        model, cross_entropy, sample, SerialCommunicator(), samples=200, microbatch=100, k=2,
        tol=1e-5, trace_matvecs=60, density_steps=1, density_probes=1, layers=False,
        slice_points=0,
    )  # fmt: skip
    np.testing.assert_allclose(found.top.values, EIGENVALUES, rtol=1e-4)
    # both are estimates: 16511 ± 432 here with these 60 products
    assert abs(found.trace.value - TRACE) < 3 * np.hypot(found.trace.error, TRACE_ERROR)
