"""Length buckets of texts: the short texts of a batch are padded to few tokens.

Each process sorts the rows of its part of a batch by the length of their texts, and cuts them into
groups of equally many rows. A group is padded to the smallest of a few lengths that all of its
texts fit in. All processes use the same lengths, which must therefore be agreed on. Pairs stay
together, and each device has equally many rows of each group.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Int32

from vlm.config import TextTowerConfig
from vlm.models.text import used_lengths

GROUPS = 8  # at most, in the rows of a device; more would save little, and make many shapes


class TextBuckets:
    """Splitter of the texts of a process's batches into buckets.

    Args:
        lengths: in tokens, ascending; the last one is the whole context.
        config: of the text tower, which must ignore padding.
        devices: of this process, among which its rows are divided.
        parts: micro-batches of a batch.

    Example:
        >>> from vlm.data.text_buckets import TextBuckets
        >>> text = vlm.TextConfig(causal=True, pool="argmax", context_length=6)
        >>> buckets = TextBuckets((3, 6), text)
        >>> tokens = np.array([[1, 9, 0, 0, 0, 0], [1, 2, 3, 4, 9, 0]], np.int32)
        >>> [x.shape for x in buckets.split({"tokens": tokens}, buckets.needs(tokens))["tokens"]]
        [(1, 3), (1, 6)]
    """

    def __init__(
        self, lengths: Sequence[int], config: TextTowerConfig, *, devices: int = 1, parts: int = 1
    ):
        self.lengths, self._config = tuple(lengths), config
        self._devices, self._parts = devices, parts

    def needs(self, tokens: Int32[np.ndarray, "b l"]) -> Int32[np.ndarray, " m"]:
        """Return how many groups of a batch are longer than each length but the last."""
        used = np.sort(self._used(tokens)).reshape(self._groups(len(tokens)), -1)[:, -1]
        return np.array([(used > length).sum() for length in self.lengths[:-1]], np.int32)

    def split(
        self, batch: dict[str, Any], needs: Int[np.ndarray, " m"], first_row: int = 0
    ) -> dict[str, Any]:
        """Sort a batch by the lengths of its texts, and split its tokens.

        `needs` are at least those of the batch. In the result, `tokens` is a tuple of arrays, one
        for each length in use, and `rows` are the numbers of the rows before, counted from
        `first_row`. Rows of a device, and of a micro-batch in it, have the order of `tokens`.
        """
        tokens = batch["tokens"]
        groups = self._groups(len(tokens))
        order = np.argsort(self._used(tokens), kind="stable")
        # Consecutive rows of a group go to different devices and micro-batches.
        order = order.reshape(groups, -1, self._devices, self._parts).transpose(2, 0, 1, 3)
        edges = [0, *(groups - needs).tolist(), groups]
        parts = zip(edges[:-1], edges[1:], self.lengths, strict=True)
        split = tuple(
            tokens[order[:, start:end].ravel(), :length]
            for start, end, length in parts
            if start < end
        )
        rows = order.ravel()
        others = {name: x for name, x in batch.items() if name != "tokens"}
        others = jax.tree.map(lambda x: x[rows], others)
        return others | {"tokens": split, "rows": (first_row + rows).astype(np.int32)}

    def _groups(self, rows: int) -> int:
        each = rows // (self._devices * self._parts)
        return max(n for n in range(1, min(each, GROUPS) + 1) if each % n == 0)

    def _used(self, tokens: Int32[np.ndarray, "b l"]) -> Int[np.ndarray, " b"]:
        used = used_lengths(tokens[:, : self.lengths[-1]], self._config)
        assert used is not None  # the config has been checked
        return used
