"""The order of samples and random numbers for them, as hashes of (seed, epoch, index).

A counter-based generator after SplitMix64 (Steele, Lea, Flood: "Fast splittable
pseudorandom number generators", OOPSLA 2014; constants of Stafford's mix 13). It is implemented
here and not taken from numpy, because an order must never change: checkpoints refer to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_WEYL = 0x9E3779B97F4A7C15  # odd, 2^64 / golden ratio: successive counters are far apart
_MASK = (1 << 64) - 1
_ORDER_STREAM = 0x6F72646572  # "order": never the same numbers as an augmentation's stream
_MODEL_STREAM = 0x6D6F64656C  # "model"
_SAMPLE_STREAM = 0x73616D706C65  # "sample"


def permutation(seed: int, epoch: int, samples: int) -> NDArray[np.int64]:
    """The order [samples] in which `epoch`, from 0, visits the samples 0 … `samples` − 1.

    `seed` is any integer, taken modulo 2^64.
    """
    hashes = _hash(_key(seed, _ORDER_STREAM), np.uint64(epoch), np.arange(samples, dtype=np.uint64))
    # The mix is a bijection of distinct counters, so no two hashes are equal and any sorting
    # algorithm gives the same answer.
    return np.argsort(hashes).astype(np.int64, copy=False)


def uniform(
    seed: int,
    epoch: int | NDArray[np.int64],
    samples: NDArray[np.int64],
    stream: int | Sequence[int],
) -> NDArray[np.float64]:
    """Random numbers [b] in [0, 1) of 53 bits, each a function of its own sample's index.

    Args:
        seed: The job's seed.
        epoch: One for all samples, or one for each, [b].
        samples: Sample indices [b].
        stream: Distinguishes the uses of random numbers for one sample within an epoch; with
            several, the result is [streams, b].
    """
    epochs = np.asarray(epoch).astype(np.uint64)
    if isinstance(stream, int):
        key: int | NDArray[np.uint64] = _key(seed, stream)
    else:
        key = np.array([[_key(seed, one)] for one in stream], np.uint64)
    hashes = _hash(key, epochs, np.asarray(samples).astype(np.uint64))
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample_seeds(
    seed: int, epochs: NDArray[np.int64], samples: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """Seeds [b] for the random generators with which samples are read.

    Args:
        seed: The job's seed.
        epochs: [b], the epoch of each sample.
        samples: [b], indices.
    """
    hashes = _hash(_key(seed, _SAMPLE_STREAM), epochs.astype(np.uint64), samples.astype(np.uint64))
    return hashes >> np.uint64(1)


def sample_seed(seed: int, epoch: int, sample: int) -> int:
    """As `sample_seeds`, of one sample."""
    return _hash_number(_key(seed, _SAMPLE_STREAM), epoch, sample) >> 1


def microbatch_seed(seed: int, index: int) -> int:
    """A seed for the random generators of a forward pass, such as dropout's.

    Args:
        seed: The job's seed.
        index: Of the microbatch in the stream.
    """
    return _hash_number(_key(seed, _MODEL_STREAM), 0, index) >> 1


@lru_cache(64)
def _key(seed: int, stream: int) -> int:
    """64 well-mixed bits of seed and stream, so that neighbouring ones are not correlated."""
    return _mix_number(_mix_number((seed + _WEYL) & _MASK) ^ (stream & _MASK))


def _hash(
    key: int | NDArray[np.uint64],
    epochs: NDArray[np.uint64] | np.uint64,
    counters: NDArray[np.uint64],
) -> NDArray[np.uint64]:
    """64 random bits for every counter; keys and epochs broadcast against counters."""
    mixed = _mix((np.atleast_1d(epochs) + np.uint64(1)) * np.uint64(_WEYL))
    start = _mix(np.asarray(key, np.uint64) ^ mixed)
    return _mix(start + (counters + np.uint64(1)) * np.uint64(_WEYL))


def _hash_number(key: int, epoch: int, counter: int) -> int:
    """As `_hash`, of single numbers: an operation of numpy takes a microsecond."""
    start = _mix_number(key ^ _mix_number((epoch + 1) * _WEYL & _MASK))
    return _mix_number((start + (counter + 1) * _WEYL) & _MASK)


def _mix_number(z: int) -> int:
    """As `_mix`."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection on 64-bit numbers in which every input bit flips half of the output bits.

    For arrays only: numpy wraps their products silently, as wanted, and warns for scalars.
    """
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
