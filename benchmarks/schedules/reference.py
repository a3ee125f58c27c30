"""Should growth by patience leave the reference where it is, or set it to the present λ?

`python -m benchmarks.schedules.reference` lets `abs` decide on λ whose true values are known, with
a scatter from sample to sample, and counts growths by λ, false ones among them (the true λ has not
fallen to λ_ref/α of the true reference), growths by patience, and the epoch of the largest batch.
The first series is measured: 10,000 CIFAR-10 images without augmentation, ResNet-8, 60 epochs with
milestones at 20, 40 and 53. The others are made up.
"""

from __future__ import annotations

import bisect
import math
import random
import statistics
from collections.abc import Sequence

from hpc_absa.records import Eigenvalue, Observation
from hpc_absa.schedules import ABS, TrainSettings

EPOCHS, TRIALS = 60, 400
COURSES = {
    "measured, without augmentation": [(1, 134), (20, 135), (22, 43), (40, 19), (42, 8), (60, 5)],
    "rises, then falls at milestones": [(1, 100), (12, 250), (20, 250), (22, 130), (40, 150),
                                        (42, 90), (60, 90)],
    "halves in 20 epochs": [(1, 100), (60, 100 * 2 ** (-59 / 20))],
}  # fmt: skip
"""λ at some epochs; the logarithm is linear in between."""


def true_value(course: Sequence[tuple[float, float]], epoch: float) -> float:
    index = min(bisect.bisect(course, (epoch, math.inf)), len(course) - 1)
    (a, x), (b, y) = course[index - 1], course[index]
    return x * (y / x) ** ((epoch - a) / (b - a))


def trial(
    course: Sequence[tuple[float, float]], scatter: float, after: str, numbers: random.Random
) -> tuple[int, int, int, int]:
    """Growths by λ, false ones, growths by patience, and the epoch of the largest batch."""
    schedule = ABS(base_batch=1, max_batch=16, reference_after_patience=after)
    rule = schedule.bind(TrainSettings(epochs=EPOCHS, microbatch=1, lr=0.1))
    state, true_reference = rule.initial(), math.inf
    by_eigenvalue = false = by_patience = 0
    largest = EPOCHS
    for epoch in range(1, EPOCHS):
        eigenvalue, true = None, true_value(course, epoch)
        if rule.wants_eigenvalue(state):
            value = true * math.exp(scatter * numbers.gauss(0, 1))
            eigenvalue = Eigenvalue(value, 0.0, 5, 128, 0.0, converged=True)
        decision = rule.decide(state, Observation(epoch, True, eigenvalue))
        by_eigenvalue += decision.cause == "eigenvalue"
        by_patience += decision.cause == "patience"
        false += decision.cause == "eigenvalue" and true > true_reference / rule.alpha
        if decision.action == "grow" and not rule.can_grow(decision.state):
            largest = epoch
        if decision.state.reference != state.reference:
            true_reference = true
        state = decision.state
    return by_eigenvalue, false, by_patience, largest


def main() -> None:
    print("| λ | scatter | reference | by λ | of these false | by patience | largest B at epoch |")
    print("| --- | --: | --- | --: | --: | --: | --: |")
    for name, course in COURSES.items():
        for scatter in (0.1, 0.3):
            for after in ("keep", "reset"):
                numbers = random.Random(0)
                trials = [trial(course, scatter, after, numbers) for _ in range(TRIALS)]
                means = [statistics.fmean(column) for column in zip(*trials, strict=True)]
                cells = " | ".join(f"{mean:.2f}" for mean in means)
                print(f"| {name} | {scatter} | {after} | {cells} |")


if __name__ == "__main__":
    main()
