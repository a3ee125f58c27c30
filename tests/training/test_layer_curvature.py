"""The curvature in each weight."""

import pytest
import torch
from torch import nn

from hpc_absa.comm import SerialCommunicator
from hpc_absa.training.layer_curvature import LayerCurvature


class Sample:
    """The four unit vectors, each with the target 0."""

    size = 4

    def load(self, start, stop):
        return torch.eye(4).double()[start:stop], torch.zeros(stop - start, 2).double()


def quadratic() -> LayerCurvature:
    """`Σ_n (2 y_n1² + 6 y_n2²) / 2N` of `y_n = W x_n`, x_n the N = 4 unit vectors: H is diagonal,
    with 2 / 4 for the first row of W and 6 / 4 for the second.
    """

    def loss(outputs, targets):
        return (torch.tensor([2.0, 6.0]).double() * outputs.square()).sum() / (2 * len(outputs))

    torch.manual_seed(0)
    model = nn.Linear(4, 2, bias=False).double()
    return LayerCurvature(
        model, loss, Sample(), SerialCommunicator(), microbatch=2, reproducible=False
    )


@pytest.mark.parametrize(("measure", "value"), [("trace", 1.0), ("eigenvalue", 1.5)])
def test_of_a_quadratic(measure, value):
    assert quadratic().of(measure, 0)["weight"] == pytest.approx(value)
