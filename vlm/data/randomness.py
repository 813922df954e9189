"""Stateless randomness: random numbers and permutations as functions of a seed and a position.

Stateful generators would need a replay after a restart, and differ between workers or processes. A
hash of the position gives the same numbers everywhere, vectorised over a batch.
"""

import numpy as np
from jaxtyping import Float, Int

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 6


def uniforms(
    seed: int, positions: Int[np.ndarray, " b"], count: int
) -> Float[np.ndarray, "b count"]:
    """Draw `count` numbers in [0, 1) per position: SplitMix64 (Steele et al., 2014) as a hash."""
    with np.errstate(over="ignore"):
        counter = positions.astype(np.uint64)[:, None] * np.uint64(count)
        counter = counter + np.arange(count, dtype=np.uint64)
        return (_mix(_key(seed) + counter * _GOLDEN) >> np.uint64(11)) * 2.0**-53


def permute(
    seed: int, epoch: int, places: Int[np.ndarray, " b"], count: int
) -> Int[np.ndarray, " b"]:
    """Permute `places` in 0..count-1 by the shuffled order of `epoch`.

    A Feistel network permutes the next even power of two, with cycle walking for values outside the
    range (Black and Rogaway, 2002). It needs no memory for any size of data.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    out = places.astype(np.uint64)
    remaining = np.arange(len(out))
    with np.errstate(over="ignore"):
        keys = _mix(_key(seed, epoch) + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN)
        while len(remaining):
            left, right = out[remaining] >> half, out[remaining] & low
            for key in keys:
                left, right = right, left ^ (_mix(right + key) & low)
            out[remaining] = (left << half) | right
            remaining = remaining[out[remaining] >= count]
    return out.astype(np.int64)


def key(*words: int) -> int:
    """Derive a seed from `words`, such as (seed, purpose, number)."""
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
