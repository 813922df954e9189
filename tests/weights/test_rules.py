"""Layouts there and back, what does not fit, and reading no more than a host's shards hold."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from vlm.errors import CheckpointError
from vlm.weights import files, rules
from vlm.weights.files import Arrays
from vlm.weights.rules import LINEAR, SAME, LayerRule, Rule, check, expand


@pytest.mark.parametrize(
    ("transform", "ours", "theirs"),
    [
        (SAME, (2, 3), (2, 3)),
        (rules.FLAT, (2, 3), (6,)),
        (LINEAR, (2, 3), (3, 2)),
        (LINEAR, (5, 2, 3), (6, 5)),  # heads split our last axis
        (rules.OUT, (2, 3, 5), (5, 6)),
        (rules.CONV, (2, 3, 4, 5), (5, 4, 2, 3)),
        (rules.SCALAR, (), ()),
        (rules.SCALAR_1, (), (1,)),
        (rules.leading(2), (3, 4), (1, 1, 3, 4)),
        (rules.WITHOUT_FIRST, (4, 3), (1, 3, 3)),
        (rules.FIRST_ROW, (3,), (-1, 3)),
    ],
)
def test_a_layout_there_and_back(transform, ours, theirs):
    x = np.arange(np.prod(ours), dtype=np.float32).reshape(ours)
    if transform is rules.WITHOUT_FIRST:
        x[0] = 0  # a class token without a position
    assert transform.shape(ours) == theirs
    there = transform.write(x)
    assert there.shape == tuple(abs(size) for size in theirs)
    np.testing.assert_array_equal(transform.read(there, ours), x)


def test_all_mismatches_are_in_one_error():
    shapes = {"vision.a": (2, 3), "vision.b": (2, 4), "text.c": (1,), "text.d": (3,)}
    table = [
        Rule("a", "vision.a"), Rule("b.{}", "vision.b"), Rule("c", "text.c"), Rule("x", "gone"),
        Rule("any", "text.d", rules.FIRST_ROW),
    ]  # fmt: skip
    sizes = {"a": (2, 3), "b.0": 4, "b.1": 4, "c": 1, "x": 1, "any": (7, 3)}
    arrays = {name: np.zeros(size, np.float32) for name, size in sizes.items()}
    layers = expand(table[:3] + table[4:], shapes)
    nothing = {"registers": np.zeros((1, 0, 3), np.float32)}  # has no elements, and needs no place
    check(layers, shapes, Arrays({k: v for k, v in arrays.items() if k != "x"} | nothing, "here"))

    def refused(arrays, table=table, ignored=lambda name: False, shapes=shapes):
        with pytest.raises(CheckpointError) as found:
            check(expand(table, shapes), shapes, Arrays(arrays, "here"), ignored)
        return str(found.value)

    assert "describes; 1 parameter that the model does not have: gone" in refused(arrays)
    less = {k: v for k, v in arrays.items() if k not in ("b.1", "c")}
    message = refused({**less, "a": np.zeros((3, 2)), "more": TABLE, "noise": TABLE})
    assert "2 parameters missing from the file: b.1, c;" in message
    assert "2 parameters in the file without a place in the model: more, noise;" in message
    assert "1 parameter of another shape: a (3, 2) (the model has (2, 3))" in message
    assert "at all" not in message
    message = refused({**less, "noise": TABLE}, ignored=lambda name: name == "noise")
    assert "without a place" not in message
    assert "1 parameter of the model without a rule: vision.a" in refused(arrays, table[1:])
    assert "of another shape: any (7, 2)" in refused({**arrays, "any": np.zeros((7, 2))})
    assert "of another shape: any (3,)" in refused({**arrays, "any": np.zeros(3)})
    no_text = {k: v for k, v in arrays.items() if k not in ("c", "any")}
    assert "describes (it has no text tower at all); 2 parameters missing" in refused(no_text)
    message = refused({"x": TABLE})
    assert "(it has no vision tower and no text tower at all); 5 parameters missing" in message


def test_a_tensor_that_holds_several_of_ours_in_every_layer():
    shapes = {"q": (2, 3, 4), "k": (2, 3, 4)}  # 2 layers, from 3 to 4
    layers = expand([Rule("qk.{}", ("q", "k"), LINEAR)], shapes)
    assert [(p.theirs, p.ours, p.layer, p.part) for p in layers] == [
        ("qk.0", "q", 0, 0), ("qk.1", "q", 1, 0), ("qk.0", "k", 0, 1), ("qk.1", "k", 1, 1)
    ]  # fmt: skip
    assert all(layer.their_shape == (8, 3) for layer in layers)
    x = np.arange(24, dtype=np.float32).reshape(8, 3)
    tensors = Arrays({"qk.0": x, "qk.1": x + 100}, "here")
    for layer in layers:
        expected = x[4 * layer.part :][:4].T + 100 * layer.layer
        np.testing.assert_array_equal(layer.read(tensors), expected)
    ours = {name: jnp.stack([p.read(tensors) for p in layers if p.ours == name]) for name in "qk"}
    again = rules.LazyTensor([p for p in layers if p.theirs == "qk.1"], ours)
    assert again.shape == (8, 3)
    np.testing.assert_array_equal(np.asarray(again), x + 100)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_buffers_begin_on_a_cache_line(dtype):
    held = [rules._aligned(shape, np.dtype(dtype)) for shape in [(), (3,), (5, 7), (1,)] * 4]
    assert [buffer.shape for buffer in held[:4]] == [(), (3,), (5, 7), (1,)]
    assert all(buffer.ctypes.data % 64 == 0 and buffer.dtype == dtype for buffer in held)


class Recorder(Arrays):
    """Tensors in memory that remember which rows were asked for."""

    def __init__(self, arrays):
        super().__init__(arrays, "here")
        self.reads = []

    def read(self, name, start=0, stop=None):
        self.reads.append((start, stop))
        return super().read(name, start, stop)


TABLE = np.arange(40 * 6, dtype=np.float32).reshape(40, 6)


def copy_slices(layer, spans, theirs=TABLE):
    tensors = Recorder({"x": theirs})
    buffers = {span: np.full([b - a for a, b in span], np.nan, np.float32) for span in spans}
    rules._copy_slices(layer, tensors, buffers)
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
    buffers, reads = copy_slices(LayerRule("x", "ours", None, SAME, (40, 6)), spans)
    for (rows, columns), buffer in buffers.items():
        assert np.array_equal(buffer, TABLE[slice(*rows), slice(*columns)])
    taken = [row for start, stop in reads for row in range(start, stop)]
    first, last = min(s[0][0] for s in spans), max(s[0][1] for s in spans)
    assert taken == list(range(first, last))  # each row once
    assert all(stop - start <= max(1, part // 6) for start, stop in reads)


def test_a_layer_that_no_shard_holds_is_not_read():
    layer = LayerRule("x", "ours", 2, LINEAR, (6, 40))
    stack = ((0, 2), (0, 6), (0, 40))
    _, reads = copy_slices(layer, [stack])
    assert reads == []
    upper = ((2, 4), (3, 6), (0, 40))
    buffers, reads = copy_slices(layer, [stack, upper])
    assert len(reads) == 1
    assert np.array_equal(buffers[upper][0], TABLE.T[3:])
