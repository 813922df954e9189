"""Order of the examples of a random-access source, with weights by one of their columns.

An epoch over n examples has n samples. With weights, example i of weight w_i is in it
c_i = w_i / mean(w) times: floor(c_i) or ceil(c_i) times, c_i times in the mean over epochs. This is
systematic sampling (Madow, 1949): the samples of an epoch lie one apart on a line on which example
i has the length c_i, from a random start. So it needs no list of copies, and each sample stays a
pure function of seed, epoch and position.
"""

import hashlib

import numpy as np
from jaxtyping import Float, Int

from vlm.config import DataConfig
from vlm.data.examples import Source
from vlm.data.randomness import key, permute, uniforms
from vlm.data.scans import column_values
from vlm.errors import ConfigError

_LARGEST = 2**31  # examples whose weights fit into memory; a repeated source is longer


class Order:
    """Order of `count` examples in each epoch; with `weights`, some come more often than others."""

    def __init__(self, count: int, weights: Float[np.ndarray, " n"] | None = None):
        self.count, self.weights, self.digest = count, weights, ""
        self._ends: np.ndarray | None = None
        if weights is not None:
            self.digest = hashlib.blake2b(weights.tobytes(), digest_size=8).hexdigest()
            ends = np.cumsum(weights)
            self._ends = ends * (count / ends[-1])
            self._last = int(np.flatnonzero(weights)[-1])

    def places(self, seed: int, positions: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
        """Return the index of the example at each position of a run."""
        epochs, within = positions // self.count, positions % self.count
        out = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            slots = permute(seed, epoch, within[here], self.count)
            if self._ends is not None:
                slots = self._at(slots + uniforms(key(seed, 7), np.array([epoch]), 1)[0, 0])
            out[here] = slots
        return out

    def draw(self, u: float) -> int:
        """Return a random example, in proportion to its weight, for a uniform number `u`."""
        if self._ends is None:
            return int(u * self.count)
        return int(self._at(np.array([u * self.count]))[0])

    def _at(self, points: Float[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
        assert self._ends is not None
        return np.minimum(np.searchsorted(self._ends, points, "right"), self._last)

    def description(self) -> str:
        """Describe the effect of the weights on an epoch; empty without weights."""
        if self.weights is None:
            return ""
        copies = self.weights / self.weights.mean()
        top = np.sort(copies)[-max(1, self.count // 10) :]
        never = int(np.sum(copies == 0))
        return (
            f"an epoch of {self.count:,} samples has {np.minimum(copies, 1).sum():,.0f} distinct "
            f"examples: each at most {np.ceil(copies.max()):,.0f} times"
            + (f", {never:,} never" if never else "")
            + f"; the tenth with the largest weights is {top.sum() / self.count:.0%} of the samples"
        )


def order_of(source: Source, config: DataConfig) -> Order:
    """Return the order of the training split, weighted by `config.weight_column` if it is set.

    Raises:
        DataError: an example without a weight, or a negative one; all weights are 0.
        ConfigError: the source is endless.
    """
    count = len(source)
    if config.weight_column is None:
        return Order(count)
    if count > _LARGEST:
        raise ConfigError(
            f"data.weight_column {config.weight_column!r} needs the weights of all {count:,} "
            f"examples of {config.source} in memory: filter by the column with data.filters"
        )
    return Order(count, column_values(source, config, config.weight_column))


def refuse_weights(config: DataConfig) -> None:
    """Raise a ConfigError if examples of a stream have weights: their mean is not known."""
    if config.weight_column is not None:
        raise ConfigError(
            f"data.weight_column {config.weight_column!r} needs random access, and {config.source} "
            'is read as a stream: set data.access="random", or filter by the column with '
            "data.filters"
        )
