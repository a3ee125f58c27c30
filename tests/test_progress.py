"""The stream of microbatches: published counts, every sample once, boundaries, cut steps."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hpc_absa.progress import Boundary, Position, Progress, SampleStream, Segment, Step, decide
from hpc_absa.records import Decision, ScheduleState
from hpc_absa.schedules import Rule

CARRY = st.builds(
    SampleStream,
    samples=st.integers(1, 60),
    microbatch=st.integers(1, 25),
    epochs=st.integers(1, 6),
    every=st.integers(1, 150),
    drop_last=st.just(False),
)
DROP = CARRY.filter(lambda stream: stream.microbatch <= stream.samples).map(
    lambda c: SampleStream(c.samples, c.microbatch, c.epochs, c.every, True)
)
STREAMS = CARRY | DROP


class GrowWhere(Rule):
    """Multiplies the batch by `factor(boundary)`."""

    def __init__(self, factor):
        self.factor = factor

    def initial(self):
        raise NotImplementedError

    def decide(self, state, observation):
        factor = self.factor(observation)
        grown = replace(state, global_batch=state.global_batch * factor)
        return Decision("grow" if factor > 1 else "continue", "", grown)


def begin(stream, per_step):
    return Progress(Position(), ScheduleState(per_step * stream.microbatch, 0.1))


def boundaries_of(stream):
    return [stream.boundary(index) for index in range(stream.num_boundaries)]


def walk(stream, per_step, grow=lambda boundary: 1):
    """All boundaries and steps in the trainer's order; `grow` is the factor of M at a boundary."""
    progress, items, rule = begin(stream, per_step), [], GrowWhere(grow)
    while (item := progress.next(stream)) is not None:
        items.append(item)
        if isinstance(item, Step):
            progress = progress.after_step(item)
            continue
        decision = decide(rule, progress.schedule, item, item)
        if step := progress.cut_step(item, decision):
            items.append(step)
            progress = progress.after_step(step)
        progress = progress.after_boundary(decision)
    return items, progress.position


def steps_in(items):
    return [item for item in items if isinstance(item, Step)]


@pytest.mark.parametrize(
    ("batch", "steps"),
    [(128, 35156), (640, 7031), (3200, 1406), (5120, 878), (10240, 439), (16000, 281)],
)
def test_a_constant_batch_has_the_steps_of_the_talk(batch, steps):
    items, position = walk(SampleStream(50_000, 128, 90, 50_000), batch // 128)
    assert position.step == len(steps_in(items)) == steps == 90 * 50_000 // batch


@given(CARRY, st.integers(1, 30))
def test_without_drop_last_every_whole_step_is_taken(stream, per_step):
    _, position = walk(stream, per_step)
    total = stream.epochs * stream.samples
    assert position.step == total // (stream.microbatch * per_step)


def visited(stream):
    """Position lists of each epoch, in the order in which microbatches have them."""
    epochs = [[] for _ in range(stream.epochs)]
    for k in range(stream.microbatches):
        segments = stream.segments(k)
        assert sum(s.stop - s.start for s in segments) == stream.microbatch
        for segment in segments:
            epochs[segment.epoch] += range(segment.start, segment.stop)
    return epochs


@given(CARRY)
def test_without_drop_last_every_position_is_visited_once_an_epoch(stream):
    epochs = visited(stream)
    left_out = stream.epochs * stream.samples % stream.microbatch
    order = [(epoch, at) for epoch, places in enumerate(epochs) for at in places]
    wanted = [(epoch, at) for epoch in range(stream.epochs) for at in range(stream.samples)]
    assert order == wanted[: len(wanted) - left_out]


@given(DROP)
def test_drop_last_leaves_out_only_the_remainder_of_each_epoch(stream):
    whole = stream.samples - stream.samples % stream.microbatch
    assert visited(stream) == [list(range(whole))] * stream.epochs


@given(DROP)
def test_with_drop_last_the_last_step_ends_at_the_last_epoch(stream):
    assert stream.epoch(stream.microbatches) == stream.epochs


@given(STREAMS)
def test_boundaries_are_in_order_up_to_the_end_of_the_stream(stream):
    boundaries = boundaries_of(stream)
    assert boundaries[-1].microbatch == stream.microbatches
    assert boundaries[-1].epoch == stream.epochs
    places = [(b.epoch, b.microbatch) for b in boundaries]
    assert places == sorted(places)
    assert len({b.epoch for b in boundaries}) == len(boundaries)
    assert [b.epoch for b in boundaries if b.ends_epoch] == list(range(1, stream.epochs + 1))


@given(STREAMS)
def test_decision_points_come_every_so_many_samples(stream):
    points = [round(b.epoch * stream.samples) for b in boundaries_of(stream) if b.decision_point]
    total = stream.epochs * stream.samples
    assert points == list(range(stream.every, total + 1, stream.every))


@given(CARRY)
def test_a_boundary_is_before_the_first_microbatch_after_its_samples(stream):
    for boundary in boundaries_of(stream)[:-1]:
        samples = round(boundary.epoch * stream.samples)
        wanted = min(math.ceil(samples / stream.microbatch), stream.microbatches)
        assert boundary.microbatch == wanted


@pytest.mark.parametrize(
    ("every", "points"),
    [
        (25, [0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3]),
        (100, [1, 2, 3]),
        (150, [1.5, 3]),
        (299, [2.99]),
        (301, []),
    ],
)
def test_decision_points_more_and_less_often_than_once_an_epoch(every, points):
    stream = SampleStream(100, 10, 3, every)
    assert [b.epoch for b in boundaries_of(stream) if b.decision_point] == points
    assert [b.epoch for b in boundaries_of(stream) if b.ends_epoch] == [1, 2, 3]


@given(STREAMS, st.integers(1, 6), st.randoms(use_true_random=False))
def test_with_any_growths_each_microbatch_is_used_once_in_order(stream, per_step, draw):
    items, position = walk(stream, per_step, lambda _: draw.choice([1, 1, 2, 3]))
    steps = steps_in(items)
    assert [k for step in steps for k in range(step.start, step.stop)] == list(
        range(position.microbatch)
    )
    assert all(step.start < step.stop for step in steps)
    assert [item for item in items if isinstance(item, Boundary)] == boundaries_of(stream)


@given(STREAMS, st.integers(1, 6), st.integers(0, 10), st.integers(2, 4))
def test_only_a_step_that_spans_a_growth_is_cut(stream, per_step, at, factor):
    assume(at < len(boundaries_of(stream)) - 1)
    growing = boundaries_of(stream)[at]
    items, _ = walk(stream, per_step, lambda b: factor if b == growing else 1)
    size = per_step
    for before, item in zip([None, *items], items, strict=False):
        if before == growing:
            size = per_step * factor
            if isinstance(item, Step) and item.stop == growing.microbatch:
                assert item.stop - item.start < per_step
                continue
        if isinstance(item, Step):
            assert item.stop - item.start == size


@given(STREAMS, st.integers(1, 6))
def test_a_boundary_comes_before_the_step_that_contains_it(stream, per_step):
    taken = 0
    items, _ = walk(stream, per_step)
    for item in items:
        if isinstance(item, Step):
            taken = item.stop
        else:
            assert taken <= item.microbatch
            assert item.microbatch < taken + per_step


def test_boundaries_of_a_billion_epochs_are_not_listed():
    stream = SampleStream(samples=50_000, microbatch=128, epochs=10**9, every=30_000)
    assert stream.num_boundaries == 10**9 + 50_000 * 10**9 // 30_000 - 50_000 * 10**9 // 150_000
    assert stream.boundary(0).epoch == 0.6
    assert stream.boundary(stream.num_boundaries - 1).last
    middle = stream.boundary(10**8)
    assert stream.boundary(10**8 + 1).epoch > middle.epoch > stream.boundary(10**8 - 1).epoch


def test_a_microbatch_that_contains_the_end_of_an_epoch_has_two_segments():
    stream = SampleStream(10, 4, 2, 10)
    assert stream.segments(2) == (Segment(0, 8, 10), Segment(1, 0, 2))


def test_a_microbatch_larger_than_the_data_set_contains_several_epochs():
    assert SampleStream(3, 8, 3, 3).segments(0) == (
        Segment(0, 0, 3),
        Segment(1, 0, 3),
        Segment(2, 0, 2),
    )


def test_a_stream_too_short_for_a_step_has_its_boundaries_and_ends():
    items, position = walk(SampleStream(100, 10, 2, 100), 50)
    assert [type(item) for item in items] == [Boundary, Boundary]
    assert position == Position(0, 0, 2)


def test_the_random_growths_of_the_tests_above_change_the_batch():
    draw = random.Random(0)
    items, _ = walk(SampleStream(60, 7, 6, 13), 2, lambda _: draw.choice([1, 2]))
    assert len({step.stop - step.start for step in steps_in(items)}) > 2


@pytest.mark.parametrize(
    ("former", "every", "microbatch", "boundary", "passed"),
    [
        (100, 25, 23, 2, 8),  # the decision point at epoch 2.25 is at the end of microbatch 23
        (100, 25, 24, 2, 9),
        (100, 25, 20, 1, 7),  # epoch 2 is not evaluated yet
        (100, 25, 20, 2, 8),
        (25, 100, 23, 9, 2),
        (100, 25, 0, 0, 0),
    ],
)
def test_a_run_that_is_continued_with_other_decision_points(
    former, every, microbatch, boundary, passed
):
    before = SampleStream(samples=100, microbatch=10, epochs=4, every=former)
    now, position = replace(before, every=every), Position(microbatch, 5, boundary)
    assert now.passed(before, position) == passed
    assert before.passed(before, position) == boundary
