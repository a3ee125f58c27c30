import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hpc_absa.data.order import (
    microbatch_seed,
    permutation,
    sample_seed,
    sample_seeds,
    uniform,
)

seeds = st.integers(-(2**70), 2**70)
epochs = st.integers(0, 2**32)


@given(seed=seeds, epoch=epochs, samples=st.integers(1, 500))
def test_an_epoch_has_every_sample_once(seed, epoch, samples):
    assert sorted(permutation(seed, epoch, samples)) == list(range(samples))


@given(samples=st.integers(1, 300), microbatch=st.integers(1, 40), ranks=st.integers(1, 8))
def test_any_split_in_ranks_covers_the_epoch(samples, microbatch, ranks):
    order = permutation(1, 2, samples)
    starts = range(0, samples, microbatch)
    shares = [[order[k : k + microbatch] for k in starts[rank::ranks]] for rank in range(ranks)]
    visited = np.concatenate([part for share in shares for part in share])
    assert sorted(visited) == list(range(samples))


def test_orders_and_numbers_never_change():
    # Checkpoints name a position in these orders: a change here would repeat and lose samples.
    assert permutation(0, 0, 10).tolist() == [1, 2, 0, 4, 5, 7, 6, 8, 9, 3]
    assert permutation(7, 3, 10).tolist() == [6, 4, 0, 1, 2, 3, 8, 5, 7, 9]
    assert permutation(0, 0, 50000)[:4].tolist() == [46051, 22954, 1217, 3091]
    assert uniform(9, 4, np.arange(2), 2).tolist() == [0.46848371974150815, 0.029506561979334767]


@given(seed=seeds, epoch=epochs, sample=st.integers(0, 2**40), stream=st.integers(0, 3))
def test_the_hash_is_the_published_one_in_plain_integers(seed, epoch, sample, stream):
    mask, weyl = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    key = mix(mix((seed + weyl) & mask) ^ stream)
    start = mix(key ^ mix((epoch + 1) * weyl & mask))
    bits = mix((start + (sample + 1) * weyl) & mask)
    assert uniform(seed, epoch, np.array([sample]), stream)[0] == (bits >> 11) / 2**53


@given(seed=seeds, epoch=st.integers(0, 2**32), sample=st.integers(0, 2**40))
def test_the_seed_of_one_sample_is_that_among_many(seed, epoch, sample):
    several = sample_seeds(seed, np.array([epoch, 0]), np.array([sample, 1]))
    assert sample_seed(seed, epoch, sample) == several[0]


def test_seeds_of_microbatches_never_change():
    assert [microbatch_seed(3, k) for k in range(2)] == [
        8828039035558192673,
        3537398674478637218,
    ]


def test_orders_of_seeds_and_epochs_are_unrelated():
    orders = [permutation(seed, epoch, 1000) for seed in range(4) for epoch in range(4)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Two random permutations agree in one place on average, and are uncorrelated.
            assert (one == other).sum() < 10
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.15


def test_every_sample_has_any_position_in_an_epoch():
    places = np.array([np.argsort(permutation(0, epoch, 20)) for epoch in range(4000)])
    for sample in range(20):
        assert stats.chisquare(np.bincount(places[:, sample], minlength=20)).pvalue > 1e-4


def test_uniform_is_uniform():
    values = uniform(3, 1, np.arange(100_000), 0)
    assert values.min() >= 0.0
    assert values.max() < 1.0
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    pairs = np.histogram2d(values[:-1], values[1:], bins=10)[0]
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-3


@pytest.mark.parametrize("change", ["seed", "epoch", "stream"])
def test_seeds_epochs_and_streams_are_independent(change):
    base = {"seed": 5, "epoch": 6, "stream": 0}
    samples = np.arange(20_000)
    one = uniform(samples=samples, **base)
    for step in (1, 2, 3):
        other = uniform(samples=samples, **{**base, change: base[change] + step})
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.03


def test_exchanging_seed_epoch_and_stream_changes_the_numbers():
    samples = np.arange(8)
    draws = [uniform(s, e, samples, t) for s, e, t in [(1, 2, 3), (2, 1, 3), (3, 2, 1), (1, 3, 2)]]
    assert len({tuple(draw) for draw in draws}) == 4


@given(
    visits=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), min_size=1, max_size=30),
    stream=st.integers(0, 5),
)
def test_a_samples_number_does_not_depend_on_other_samples(visits, stream):
    epochs, samples = np.array(visits).T
    together = uniform(0, epochs, samples, stream)
    alone = [uniform(0, int(e), np.array([s]), stream)[0] for e, s in visits]
    assert together.tolist() == alone


def test_several_streams_at_once_are_the_same_numbers():
    epochs, samples = np.array([0, 3, 1]), np.array([5, 0, 2**40])
    together = uniform(9, epochs, samples, [4, 0, 77])
    assert together.tolist() == [uniform(9, epochs, samples, k).tolist() for k in (4, 0, 77)]
