"""On a trained net with 20 layers: what Ω predicts is measured, and the program makes use of it."""

import numpy as np
import pytest

from hpc_absa.comm import SerialCommunicator
from hpc_absa.training.load import Source, load
from hpc_absa.training.quantize import Options, Quantizer
from tests.training import runs

CHANGES = (
    'data={name="digits"}', 'model={name="resnet20", widths=[8, 16, 32]}', "train.epochs=20",
    "train.microbatch=64", "train.lr=0.1", "train.weight_decay=5e-4", "train.milestones=[12, 17]",
    "train.lr_decay=0.2", 'schedule={method="bl", base_batch=64}', "hessian={}",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_omega_predicts_the_even_part_of_the_rise(tmp_path):
    """The odd part is the gradient's: weight decay keeps the loss from a minimum of its own."""
    runs.train(tmp_path, *CHANGES)
    comm = SerialCommunicator()
    loaded = load(Source(tmp_path), comm)
    found = Quantizer(loaded, comm, Options(samples=512, check=50)).run(None)
    assert found.check.rank_correlation >= 0.8
    assert found.check.chosen_loss < np.median(found.check.random_losses)
    accuracy = {measured.name: measured.accuracy for measured in found.measured}
    assert abs(accuracy["8 bits"] - accuracy["float32"]) <= 0.003
