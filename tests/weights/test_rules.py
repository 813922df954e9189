"""Reading parts: each host takes of a checkpoint what its shards hold, and a table in strips."""

import numpy as np
import pytest

from vlm.weights import files, rules
from vlm.weights.files import Arrays
from vlm.weights.rules import LINEAR, SAME, Piece


class Recorder(Arrays):
    """Tensors in memory that remember which rows were asked for."""

    def __init__(self, arrays):
        super().__init__(arrays, "here")
        self.reads = []

    def read(self, name, start=0, stop=None):
        self.reads.append((start, stop))
        return super().read(name, start, stop)


TABLE = np.arange(40 * 6, dtype=np.float32).reshape(40, 6)


def pour(piece, spans, theirs=TABLE):
    tensors = Recorder({"x": theirs})
    buffers = {span: np.full([b - a for a, b in span], np.nan, np.float32) for span in spans}
    rules._pour(piece, tensors, buffers)
    return buffers, tensors.reads


@pytest.mark.parametrize("part", [6, 50, 1000])
@pytest.mark.parametrize(
    "spans",
    [
        [((0, 40), (0, 6))],
        [((10, 20), (0, 6))],
        [((10, 20), (0, 3)), ((10, 20), (3, 6)), ((20, 30), (0, 3))],
    ],
)
def test_a_table_is_read_in_strips_and_only_where_it_is_wanted(spans, part, monkeypatch):
    monkeypatch.setattr(files, "_PART", part)
    buffers, reads = pour(Piece("x", "ours", None, SAME, (40, 6)), spans)
    for (rows, columns), buffer in buffers.items():
        assert np.array_equal(buffer, TABLE[slice(*rows), slice(*columns)])
    taken = [row for start, stop in reads for row in range(start, stop)]
    first, last = min(s[0][0] for s in spans), max(s[0][1] for s in spans)
    assert taken == list(range(first, last))  # each row once
    assert all(stop - start <= max(1, part // 6) for start, stop in reads)


def test_a_layer_that_no_shard_holds_is_not_read():
    layer = Piece("x", "ours", 2, LINEAR, (6, 40))
    stack = ((0, 2), (0, 6), (0, 40))
    _, reads = pour(layer, [stack])
    assert reads == []
    upper = ((2, 4), (3, 6), (0, 40))
    buffers, reads = pour(layer, [stack, upper])
    assert len(reads) == 1
    assert np.array_equal(buffers[upper][0], TABLE.T[3:])
