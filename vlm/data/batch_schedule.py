"""Schedule of the batch sizes of a run: a pure function of its seed and the step."""

import math
from collections.abc import Sequence

import numpy as np

from vlm.config.batch_sizes import BatchSize
from vlm.data.randomness import key, permute

_PURPOSE = 9  # of the seed


class BatchSchedule:
    """Size of the global batch at each step, equal in all processes.

    Each round of as many steps as there are sizes has each of them once, in a random order.

    Example:
        >>> from vlm.config.batch_sizes import BatchSize
        >>> from vlm.data.batch_schedule import BatchSchedule
        >>> schedule = BatchSchedule([BatchSize(8, 64), BatchSize(2, 256)], seed=0)
        >>> schedule.pairs_before(10), schedule.steps_of(100)
        (50, 20)
    """

    def __init__(self, sizes: Sequence[BatchSize], seed: int):
        self.sizes, self._seed = tuple(sizes), seed
        self._round = sum(size.pairs for size in sizes)  # pairs

    def at(self, step: int) -> BatchSize:
        """Return the size of the batch `step`, counted from 0."""
        if len(self.sizes) == 1:
            return self.sizes[0]
        number, place = divmod(step, len(self.sizes))
        seed = key(self._seed, _PURPOSE)
        return self.sizes[permute(seed, number, np.array([place]), len(self.sizes))[0]]

    def pairs_before(self, step: int) -> int:
        """Return the number of pairs in the first `step` batches."""
        rounds = step // len(self.sizes)
        rest = range(rounds * len(self.sizes), step)
        return rounds * self._round + sum(self.at(s).pairs for s in rest)

    def steps_of(self, pairs: int, first: int = 0) -> int:
        """Return the largest number of steps from `first` on with at most so many pairs.

        It is negative for a negative number of pairs.
        """
        end = self.pairs_before(first) + pairs
        step = end // self._round * len(self.sizes)
        while self.pairs_before(step + 1) <= end:
            step += 1
        return step - first

    @property
    def divisor(self) -> int:
        """Largest number that divides all batches."""
        return math.gcd(*(size.pairs for size in self.sizes))
