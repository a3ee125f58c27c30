"""The figure of sensitivities and an allocation."""

import numpy as np

from hpc_absa.curvature.stochastic import Trace
from hpc_absa.quantization import plot
from hpc_absa.quantization.graph import Layer
from hpc_absa.quantization.sensitivity import Sensitivity


def test_more_choices_of_bits_than_colours(tmp_path):
    bits, file = tuple(range(2, 9)), tmp_path / "q.png"
    errors = 4.0 ** -np.array(bits)
    layers = [Sensitivity(Layer(name, 10, 10), Trace(1.0, 0.1, 6), errors) for name in "ab"]
    plot.draw(layers, bits, {"a": 2, "b": 8}, None, (10.0, 0.1), file)
    assert file.read_bytes().startswith(b"\x89PNG")
