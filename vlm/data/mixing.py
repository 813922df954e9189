"""Mixing of batches: their distinct classes or captions, relative to random order.

Random order is a batch drawn without replacement from the examples. A stream over shards that are
sorted by class has fewer classes in a batch, if too few of its readers are in different places.
"""

import collections
import zlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from vlm.config import DataConfig
from vlm.data.examples import Example, captions_of, label_of

LEAST = 0.8  # of random order's distinct classes; below, a run warns

_FIRST = 4  # batches before the first look; then after every doubling
_EXAMPLES = 1 << 20  # counted by a run, at most


def group_of(example: Example, config: DataConfig) -> int:
    """Return a hash of an example's class, or of its first caption; BadSample without either."""
    text = label_of(example, config) if config.label else captions_of(example, config)[0]
    return zlib.crc32(text.encode())


def expected_distinct(counts: Iterable[int], batch: int) -> float:
    """Expected number of distinct groups in a batch of random order.

    A group of n of N examples is absent from a batch of B with probability C(N-n, B) / C(N, B).

    Args:
        counts: examples of each group.
        batch: size of the batch; at most the number of examples.

    Example:
        >>> from vlm.data.mixing import expected_distinct
        >>> expected_distinct([1, 1], 1), round(expected_distinct([2, 2], 2), 3)
        (1.0, 1.667)
    """
    n = np.asarray(list(counts), np.int64)
    if not n.size:
        return 0.0
    total = int(n.sum())
    batch = min(batch, total)
    # The quotient is the product of 1 - B / (N-j) over j < n.
    drawn = np.minimum(batch / (total - np.arange(n.max())), 1)
    with np.errstate(divide="ignore"):
        absent = np.exp(np.cumsum(np.log1p(-drawn)))
    return float(np.sum(1 - np.concatenate([[1.0], absent])[n]))


class MixingResult(NamedTuple):
    """Distinct groups in a batch of `batch` examples: their mean, and that of random order."""

    batch: int
    distinct: float
    random: float

    @property
    def share(self) -> float:
        """Distinct groups relative to random order."""
        return self.distinct / self.random


def measure(
    batches: Iterable[Iterable[int]], counts: Mapping[int, int] | None = None
) -> MixingResult:
    """Compare batches of group hashes with random order.

    `counts` has the examples of each group in the data. None: those of all batches together.
    """
    parts = [list(batch) for batch in batches]
    counts = counts or collections.Counter(group for part in parts for group in part)
    size = len(parts[0])
    distinct = float(np.mean([len(set(part)) for part in parts]))
    return MixingResult(size, distinct, expected_distinct(counts.values(), size))


class MixingMonitor:
    """Watches the batches of a run, and finds those that are mixed worse than `LEAST`.

    Random order is estimated from the examples so far. They cover more of the data with every
    batch, so it is compared again whenever their number has doubled.
    """

    def __init__(self) -> None:
        self._counts: collections.Counter[int] = collections.Counter()
        self._distinct, self._batches, self._next = 0, 0, _FIRST

    def add(self, groups: np.ndarray) -> MixingResult | None:
        """Count the groups of a batch; return the result, once, if it is below `LEAST`."""
        if not self._next:
            return None
        values, counts = np.unique(groups, return_counts=True)
        self._counts.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        self._distinct += len(values)
        self._batches += 1
        if self._batches < self._next:
            return None
        self._next *= 2
        size = len(groups)
        random = expected_distinct(self._counts.values(), size)
        result = MixingResult(size, self._distinct / self._batches, random)
        if result.share < LEAST or self._batches * size >= _EXAMPLES:
            self._next = 0
            self._counts.clear()
        return result if result.share < LEAST else None
