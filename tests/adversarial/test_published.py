"""The trust-region attack on a trained ResNet-20, against what the authors' code does there.

The same images are fooled with nearly the same perturbations. Its inputs are limited to the range
of the images of a batch, ours to the valid range.
"""

import pytest
import torch
from torch.nn import functional

from hpc_absa.adversarial import attacks
from hpc_absa.adversarial.attacks import pgd, trust_region
from tests import shared_data

PUBLISHED = {
    # norm, hard, adaptive: still correct, mean, largest, image updates
    ("l2", False, True): (0, 0.00396, 0.0177, 1805),
    ("l2", True, True): (0, 0.00574, 0.0262, 2050),
    ("l2", False, False): (24, 0.00321, 0.0119, 18538),
    ("linf", False, False): (0, 0.00285, 0.0125, 679),
    ("linf", False, True): (0, 0.00290, 0.0129, 430),
    ("linf", True, False): (0, 0.00422, 0.0163, 955),
    ("linf", True, True): (0, 0.00468, 0.0221, 507),
}


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def resnet20():
    """The network, and every hundredth test image with its class."""
    model = shared_data.trained_resnet20()
    inputs, targets = shared_data.images(100)
    with torch.no_grad():
        assert int((model(inputs).argmax(1) == targets).sum()) == 79
    return model, inputs, targets


def run(resnet20, norm, hard, adaptive, **settings):
    """Still correct, mean and largest perturbation, image updates."""
    model, inputs, targets = resnet20
    valid = shared_data.valid_range()
    found = trust_region(
        model, inputs, targets, valid, norm=norm, hard=hard, adaptive=adaptive, **settings
    )
    left = int(attacks.correct(model, found.inputs, targets).sum())
    size = attacks.relative_size(found.inputs, inputs, norm)
    return left, float(size.mean()), float(size.max()), int(found.updates.sum())


@pytest.mark.parametrize(("norm", "hard", "adaptive"), PUBLISHED)
def test_the_table(resnet20, norm, hard, adaptive):
    left, mean, largest, updates = PUBLISHED[norm, hard, adaptive]
    found = run(resnet20, norm, hard, adaptive, reference=True)
    assert found[0] == left
    assert found[1] == pytest.approx(mean, rel=0.02)
    assert found[2] == pytest.approx(largest, rel=0.1)
    assert found[3] == pytest.approx(updates, rel=0.02)
    if adaptive:
        ours = run(resnet20, norm, hard, adaptive)
        assert ours[0] <= left
        assert ours[1] <= mean * 1.01


def test_pgd_needs_larger_perturbations_for_the_same_success(resnet20):
    model, inputs, targets = resnet20
    std = torch.tensor(shared_data.STD).view(1, 3, 1, 1)
    epsilon = 4 / 255 / std
    found = pgd(model, functional.cross_entropy, inputs, targets, epsilon,
                shared_data.valid_range(), steps=10)  # fmt: skip
    assert not attacks.correct(model, found.inputs, targets).any()
    size = attacks.relative_size(found.inputs, inputs, "linf")
    assert float(size.mean()) > 2 * PUBLISHED["linf", False, True][1]
