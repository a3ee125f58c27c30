"""The stream of microbatches: published counts, every sample exactly once, boundaries, cuts."""

import math
import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hpc_absa.progress import Boundary, Course, Position, Segment, Step

CARRY = st.builds(
    Course,
    samples=st.integers(1, 60),
    microbatch=st.integers(1, 25),
    epochs=st.integers(1, 6),
    every=st.integers(1, 150),
    drop_last=st.just(False),
)
DROP = CARRY.filter(lambda course: course.microbatch <= course.samples).map(
    lambda c: Course(c.samples, c.microbatch, c.epochs, c.every, "drop")
)
COURSES = CARRY | DROP


def walk(course, per_step, grow=lambda boundary: 1):
    """All moves, as the training loop makes them; `grow` gives a boundary's factor of M."""
    position, moves = Position(), []
    while (move := course.next(position, per_step)) is not None:
        if isinstance(move, Step):
            moves.append(move)
            position = Position(move.stop, position.step + 1, position.boundary)
            continue
        moves.append(move)
        factor = 1 if move == course.boundaries[-1] else grow(move)
        microbatch, steps = position.microbatch, position.step
        if factor > 1 and microbatch < move.microbatch:
            moves.append(Step(microbatch, move.microbatch))
            microbatch, steps = move.microbatch, steps + 1
        per_step *= factor
        position = Position(microbatch, steps, position.boundary + 1)
    return moves, position


def steps_of(moves):
    return [move for move in moves if isinstance(move, Step)]


@pytest.mark.parametrize(
    ("batch", "steps"),
    [(128, 35156), (640, 7031), (3200, 1406), (5120, 878), (10240, 439), (16000, 281)],
)
def test_steps_of_a_constant_batch_are_the_talk_s(batch, steps):
    moves, position = walk(Course(50_000, 128, 90, 50_000), batch // 128)
    assert position.step == len(steps_of(moves)) == steps == 90 * 50_000 // batch


@given(CARRY, st.integers(1, 30))
def test_carry_takes_every_whole_step_of_the_samples(course, per_step):
    _, position = walk(course, per_step)
    total = course.epochs * course.samples
    assert position.step == total // (course.microbatch * per_step)


def visited(course):
    """Position lists of each epoch, in the order in which microbatches have them."""
    epochs = [[] for _ in range(course.epochs)]
    for k in range(course.microbatches):
        segments = course.segments(k)
        assert sum(s.stop - s.start for s in segments) == course.microbatch
        for segment in segments:
            epochs[segment.epoch] += range(segment.start, segment.stop)
    return epochs


@given(CARRY)
def test_carry_visits_every_position_of_every_epoch_once(course):
    epochs = visited(course)
    left_out = course.epochs * course.samples % course.microbatch
    stream = [(epoch, at) for epoch, places in enumerate(epochs) for at in places]
    wanted = [(epoch, at) for epoch in range(course.epochs) for at in range(course.samples)]
    assert stream == wanted[: len(wanted) - left_out]


@given(DROP)
def test_drop_leaves_out_each_epoch_s_remainder_alone(course):
    whole = course.samples - course.samples % course.microbatch
    assert visited(course) == [list(range(whole))] * course.epochs


@given(COURSES)
def test_boundaries_rise_to_the_end_of_the_stream(course):
    boundaries = course.boundaries
    assert boundaries[-1].microbatch == course.microbatches
    assert boundaries[-1].epoch == course.epochs
    places = [(b.epoch, b.microbatch) for b in boundaries]
    assert places == sorted(places)
    assert len({b.epoch for b in boundaries}) == len(boundaries)
    assert [b.epoch for b in boundaries if b.ends_epoch] == list(range(1, course.epochs + 1))


@given(COURSES)
def test_decision_points_come_every_so_many_samples(course):
    points = [round(b.epoch * course.samples) for b in course.boundaries if b.decision_point]
    total = course.epochs * course.samples
    assert points == list(range(course.every, total + 1, course.every))


@given(CARRY)
def test_a_boundary_lies_at_the_first_microbatch_behind_its_samples(course):
    for boundary in course.boundaries[:-1]:
        samples = round(boundary.epoch * course.samples)
        wanted = min(math.ceil(samples / course.microbatch), course.microbatches)
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
def test_decision_points_within_and_beyond_an_epoch(every, points):
    course = Course(100, 10, 3, every)
    assert [b.epoch for b in course.boundaries if b.decision_point] == points
    assert [b.epoch for b in course.boundaries if b.ends_epoch] == [1, 2, 3]


@given(COURSES, st.integers(1, 6), st.randoms(use_true_random=False))
def test_any_growths_take_each_microbatch_once_in_order(course, per_step, draw):
    moves, position = walk(course, per_step, lambda _: draw.choice([1, 1, 2, 3]))
    steps = steps_of(moves)
    assert [k for step in steps for k in range(step.start, step.stop)] == list(
        range(position.microbatch)
    )
    assert all(step.start < step.stop for step in steps)
    assert [move for move in moves if isinstance(move, Boundary)] == list(course.boundaries)


@given(COURSES, st.integers(1, 6), st.integers(0, 10), st.integers(2, 4))
def test_only_a_step_over_a_growing_boundary_is_cut(course, per_step, at, factor):
    assume(at < len(course.boundaries) - 1)
    growing = course.boundaries[at]
    moves, _ = walk(course, per_step, lambda b: factor if b == growing else 1)
    size = per_step
    for before, move in zip([None, *moves], moves, strict=False):
        if before == growing:
            size = per_step * factor
            if isinstance(move, Step) and move.stop == growing.microbatch:
                assert move.stop - move.start < per_step
                continue
        if isinstance(move, Step):
            assert move.stop - move.start == size


@given(COURSES, st.integers(1, 6))
def test_a_boundary_is_met_before_the_step_that_it_lies_in(course, per_step):
    taken = 0
    moves, _ = walk(course, per_step)
    for move in moves:
        if isinstance(move, Step):
            taken = move.stop
        else:
            assert taken <= move.microbatch
            assert move.microbatch < taken + per_step


@given(COURSES, st.integers(1, 6), st.integers(0, 40))
def test_a_walk_broken_off_and_taken_up_again_is_the_same(course, per_step, count):
    moves, _ = walk(course, per_step)
    position = Position()
    for move in moves[:count]:
        if isinstance(move, Step):
            position = Position(move.stop, position.step + 1, position.boundary)
        else:
            position = Position(position.microbatch, position.step, position.boundary + 1)
    expected = moves[count] if count < len(moves) else None
    assert course.next(position, per_step) == expected


def test_a_microbatch_over_an_epoch_s_end_has_two_segments():
    course = Course(10, 4, 2, 10)
    assert course.segments(2) == (Segment(0, 8, 10), Segment(1, 0, 2))


def test_a_microbatch_larger_than_the_data_goes_through_several_epochs():
    assert Course(3, 8, 3, 3).segments(0) == (
        Segment(0, 0, 3),
        Segment(1, 0, 3),
        Segment(2, 0, 2),
    )


def test_a_course_too_short_for_a_step_meets_its_boundaries_and_ends():
    moves, position = walk(Course(100, 10, 2, 100), 50)
    assert [type(move) for move in moves] == [Boundary, Boundary]
    assert position == Position(0, 0, 2)


def test_random_growths_do_happen_in_the_tests_above():
    draw = random.Random(0)
    moves, _ = walk(Course(60, 7, 6, 13), 2, lambda _: draw.choice([1, 2]))
    assert len({step.stop - step.start for step in steps_of(moves)}) > 2
