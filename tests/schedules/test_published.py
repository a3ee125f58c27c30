"""ABSA against the published algorithm, restated as a table from the authors' public code.

The restatement knows nothing of our classes. Growth comes before the milestone's decay in it.
"""

import math
import random

from hpc_absa.schedules import ABSA
from tests.schedules.tables import at, bound, follow

EPOCHS, MILESTONES, RHO, KAPPA = 90, (30, 60, 80), 0.2, 10

# What happens after an epoch with B < B_max, first row that applies:
#   condition on (λ, λ_ref, epochs since growth)  | grow  | the next λ_ref
ROWS = [
    (lambda eig, ref, waited: ref is None and waited < KAPPA, False, lambda eig, ref: eig),
    (lambda eig, ref, waited: ref is not None and eig <= ref / 2, True, lambda eig, ref: eig),
    (lambda eig, ref, waited: waited >= KAPPA, True, lambda eig, ref: ref),
    (lambda eig, ref, waited: True, False, lambda eig, ref: ref),
]


def published(eigenvalues, max_batch):
    """(batch, learning rate, adversarial ratio, reference) after each epoch."""
    batch, lr, ratio, reference, waited, after = 128, 0.1, 0.2, None, 0, []
    for epoch, eig in enumerate(eigenvalues, start=1):
        if batch < max_batch:
            waited += 1
            _, grow, following = next(r for r in ROWS if r[0](eig, reference, waited))
            reference = following(eig, reference)
            if grow:
                larger = min(2 * batch, max_batch)
                lr, batch, ratio, waited = lr * larger / batch, larger, ratio / 2, 0
        if batch == max_batch or epoch >= EPOCHS / 2:
            ratio = 0.0
        if epoch in MILESTONES:
            lr *= RHO
        after.append((batch, lr, ratio, reference))
    return after


def ours(eigenvalues, max_batch, **keys):
    schedule = ABSA(base_batch=128, max_batch=max_batch, **keys)
    settings = {"epochs": EPOCHS, "microbatch": 128, "milestones": MILESTONES, "lr_decay": RHO}
    seen = [at(epoch, eig) for epoch, eig in enumerate(eigenvalues, start=1)]
    states = [decision.state for decision in follow(bound(schedule, **settings), seen)]
    return [(s.global_batch, s.lr, s.adversarial_fraction, s.reference) for s in states]


def sequences(count):
    """λ of 90 epochs each: steps that fall at milestones, a trend, and scatter of 0.05 to 0.5."""
    for seed in range(count):
        draw = random.Random(seed)
        scatter, trend = draw.uniform(0.05, 0.5), draw.uniform(-0.08, 0.03)
        level, eigenvalues = math.log(draw.uniform(10, 200)), []
        for epoch in range(1, EPOCHS + 1):
            level += trend + (draw.uniform(-1.5, 0) if epoch in MILESTONES else 0)
            eigenvalues.append(math.exp(level + draw.gauss(0, scatter)))
        yield eigenvalues, draw.choice([640, 3200, 5120, 10240, 16000])


def same(one, other):
    """Up to rounding: decay and growth are multiplied in another order."""
    pairs = ((a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))
    return all(a == b or (a and b and math.isclose(a, b, rel_tol=1e-12)) for a, b in pairs)


def test_equal_in_all_of_500_sequences_if_patience_keeps_the_reference():
    for eigenvalues, max_batch in sequences(500):
        kept = ours(eigenvalues, max_batch, reference_after_patience="keep")
        assert same(kept, published(eigenvalues, max_batch))


def test_a_reference_that_patience_resets_differs_in_many():
    different = 0
    for eigenvalues, max_batch in sequences(100):
        reset = ours(eigenvalues, max_batch, reference_after_patience="reset")
        different += not same(reset, published(eigenvalues, max_batch))
    assert different > 30


def test_they_also_grow_by_a_negative_eigenvalue_and_we_do_not():
    eigenvalues = [8.0, -1.0, *[8.0] * (EPOCHS - 2)]
    assert published(eigenvalues, 640)[1][0] == 256
    assert ours(eigenvalues, 640)[1][0] == 128
