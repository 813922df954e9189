"""Detection of single items, lists and their kinds."""

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from vlm.errors import DataError
from vlm.heads.inputs import default_id, split

FLOATS, BYTES = np.float32, np.uint8


@pytest.mark.parametrize(
    ("items", "kind", "count", "single"),
    [
        ("a text", "text", 1, True),
        (["a text", "another"], "text", 2, False),
        (np.ones(4, FLOATS), "embedding", 1, True),
        (jnp.ones(4, jnp.bfloat16), "embedding", 1, True),
        (np.ones((2, 4), FLOATS), "embedding", 2, False),
        ([np.ones(4, FLOATS)], "embedding", 1, False),
        (np.ones((2, 4), BYTES), "image", 1, True),  # of greys
        (np.ones((2, 4, 3), BYTES), "image", 1, True),
        (np.ones((2, 4, 3), FLOATS), "image", 1, True),
        (np.ones((5, 2, 4, 3), BYTES), "image", 5, False),
        (Path("a.png"), "image", 1, True),
        ((Path(name) for name in "abc"), "image", 3, False),
        ([], None, 0, False),
    ],
)
def test_kinds_of_input(items, kind, count, single):
    found, stream, alone = split(items, "search")
    assert (found, len(list(stream)), alone) == (kind, count, single)


@pytest.mark.untyped
@pytest.mark.parametrize("items", [3, None, np.ones(4, int), [np.ones(4, int)], [None]])
def test_unsupported_types_are_refused(items):
    with pytest.raises(DataError, match="search got a "):
        split(items, "search")


def test_default_ids():
    assert default_id(Path("a.png"), 3) == os.path.abspath("a.png")
    assert default_id(Path("x/../a.png"), 3) == os.path.abspath("a.png")
    assert default_id(Path("a.png"), 3, {"a.png"}) == "a.png"  # of an index of an older version
    assert default_id(epath.Path("gs://bucket/a.png"), 3) == "gs://bucket/a.png"
    assert default_id("a.png", 3) == 3  # a text
