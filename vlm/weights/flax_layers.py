"""Rules for the layers that every family from flax is made of; names of theirs are paths."""

import math

from vlm.weights.rules import FLAT, Rule, Transform

# Kernels whose heads are merged; the input comes first in both, so that nothing is turned.
MERGED = Transform(
    lambda s: (s[0], math.prod(s[1:])), lambda x, s: x.reshape(s), lambda x: x.reshape(len(x), -1)
)
MERGED_OUT = Transform(
    lambda s: (math.prod(s[:-1]), s[-1]),
    lambda x, s: x.reshape(s),
    lambda x: x.reshape(-1, x.shape[-1]),
)


def dense(theirs: str, ours: str) -> list[Rule]:
    """A flax Dense."""
    return [Rule(f"{theirs}/kernel", f"{ours}.kernel"), Rule(f"{theirs}/bias", f"{ours}.bias")]


def norm(theirs: str, ours: str) -> list[Rule]:
    """A flax LayerNorm."""
    return [Rule(f"{theirs}/scale", f"{ours}.scale"), Rule(f"{theirs}/bias", f"{ours}.bias")]


def attention(theirs: str, ours: str) -> list[Rule]:
    """A flax MultiHeadDotProductAttention, whose heads are axes as ours are."""
    names = ("query", "key", "value", "out")
    return [rule for name in names for rule in dense(f"{theirs}/{name}", f"{ours}.{name}")]


def merged_attention(theirs: str, ours: str) -> list[Rule]:
    """Attention of four flax Denses, whose heads are merged."""
    return [
        *(
            rule
            for name in ("query", "key", "value")
            for rule in (
                Rule(f"{theirs}/{name}/kernel", f"{ours}.{name}.kernel", MERGED),
                Rule(f"{theirs}/{name}/bias", f"{ours}.{name}.bias", FLAT),
            )
        ),
        Rule(f"{theirs}/out/kernel", f"{ours}.out.kernel", MERGED_OUT),
        Rule(f"{theirs}/out/bias", f"{ours}.out.bias"),
    ]


def mlp(theirs: str, ours: str) -> list[Rule]:
    """The MLP of big_vision and scenic."""
    return [
        *dense(f"{theirs}/Dense_0", f"{ours}.up"),
        *dense(f"{theirs}/Dense_1", f"{ours}.down"),
    ]
