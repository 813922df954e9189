"""Randomness without state: numbers and orders as functions of a seed and a position.

Generators with a state would have to be replayed after a restart and would give each worker or
process other numbers. A hash of the position gives the same ones to all, at once for a whole batch.
"""

import numpy as np
from jaxtyping import Float, Int

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 6


def uniforms(
    seed: int, positions: Int[np.ndarray, " b"], count: int
) -> Float[np.ndarray, "b count"]:
    """`count` numbers in [0, 1) for each position: SplitMix64 (Steele et al., 2014) as a hash."""
    with np.errstate(over="ignore"):
        counter = positions.astype(np.uint64)[:, None] * np.uint64(count)
        counter = counter + np.arange(count, dtype=np.uint64)
        return (_mix(_key(seed) + counter * _GOLDEN) >> np.uint64(11)) * 2.0**-53


def permute(
    seed: int, epoch: int, places: Int[np.ndarray, " b"], count: int
) -> Int[np.ndarray, " b"]:
    """Where each of `places` in 0..count-1 goes in the shuffled order of `epoch`.

    A Feistel network permutes the next even power of two; what falls outside walks on until it
    falls inside (Black and Rogaway, 2002). No memory, whatever the size of the data.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    out = places.astype(np.uint64)
    todo = np.arange(len(out))
    with np.errstate(over="ignore"):
        keys = _mix(_key(seed, epoch) + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN)
        while len(todo):
            left, right = out[todo] >> half, out[todo] & low
            for key in keys:
                left, right = right, left ^ (_mix(right + key) & low)
            out[todo] = (left << half) | right
            todo = todo[out[todo] >= count]
    return out.astype(np.int64)


def key(*words: int) -> int:
    """A seed of its own for whatever `words` say, such as (seed, purpose, number)."""
    with np.errstate(over="ignore"):
        return int(_key(*words))


def _key(*words: int) -> np.uint64:
    key = np.uint64(0)
    for word in words:
        key = _mix(key + np.uint64(word & (2**64 - 1)) + _GOLDEN)
    return key


def _mix(x):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
