"""The Hessian of a trained ResNet-20 over 200 images, against PyHessian's numbers for it."""

import numpy as np
import pytest
from torch.func import functional_call, jacrev

from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature.spectrum import spectrum
from tests import shared_data

EIGENVALUES = [2215.76, 1487.99]


class Sample:
    def __init__(self, inputs, targets):
        self.inputs, self.targets, self.size = inputs, targets, len(targets)

    def load(self, start, stop):
        return self.inputs[start:stop], self.targets[start:stop]


def exact_trace(model, inputs):
    """Without random vectors, from 10 gradients of each image.

    In evaluation mode the logits of this net are piecewise linear in each single weight (ReLU, and
    batch norm with fixed statistics), so `∂²z/∂w²` is zero, and what is left of the diagonal of H
    is that of its Gauss-Newton part: `tr H = mean over n of Σ_c p_c ‖∇_w log p_c(x_n)‖²`, p the
    softmax of the logits.
    """
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def log_probabilities(weights, image):
        return functional_call(model, weights, (image[None],))[0].log_softmax(0)

    total = 0.0
    for image in inputs:
        rows = jacrev(log_probabilities)(weights, image)
        squares = sum(row.double().flatten(1).square().sum(1) for row in rows.values())
        total += float(log_probabilities(weights, image).double().exp() @ squares)
    return total / len(inputs)


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
    assert abs(found.trace.value - exact_trace(model, sample.inputs)) < 2 * found.trace.error
