"""Rules of Flax layers, and of the blocks of big_vision and scenic. Their names are paths."""

import math
from collections.abc import Callable
from typing import Any

from vlm.weights.rules import FLAT, SAME, Rule, Shapes, Transform, count_layers

# Kernels whose heads are merged; the input axis comes first in both, so nothing is transposed.
MERGED = Transform(
    lambda s: (s[0], math.prod(s[1:])), lambda x, s: x.reshape(s), lambda x: x.reshape(len(x), -1)
)
MERGED_OUT = Transform(
    lambda s: (math.prod(s[:-1]), s[-1]),
    lambda x, s: x.reshape(s),
    lambda x: x.reshape(-1, x.shape[-1]),
)


def dense(theirs: str, ours: str, kernel: Transform = SAME, bias: Transform = SAME) -> list[Rule]:
    """Dense."""
    return [
        Rule(f"{theirs}/kernel", f"{ours}.kernel", kernel),
        Rule(f"{theirs}/bias", f"{ours}.bias", bias),
    ]


def norm(theirs: str, ours: str) -> list[Rule]:
    """LayerNorm."""
    return [Rule(f"{theirs}/scale", f"{ours}.scale"), Rule(f"{theirs}/bias", f"{ours}.bias")]


def attention(theirs: str, ours: str) -> list[Rule]:
    """MultiHeadDotProductAttention, whose heads are axes as in our model."""
    names = ("query", "key", "value", "out")
    return [rule for name in names for rule in dense(f"{theirs}/{name}", f"{ours}.{name}")]


def merged_attention(theirs: str, ours: str) -> list[Rule]:
    """Attention of four Dense layers, whose heads are merged."""
    names = ("query", "key", "value")
    heads = [
        rule for name in names for rule in dense(f"{theirs}/{name}", f"{ours}.{name}", MERGED, FLAT)
    ]
    return [*heads, *dense(f"{theirs}/out", f"{ours}.out", MERGED_OUT)]


def mlp(theirs: str, ours: str) -> list[Rule]:
    """MLP of big_vision and scenic."""
    return [*dense(f"{theirs}/Dense_0", f"{ours}.up"), *dense(f"{theirs}/Dense_1", f"{ours}.down")]


Attention = Callable[[str, str], list[Rule]]


def attention_half(theirs: str, ours: str, attention: Attention = attention) -> list[Rule]:
    """Transformer block without its MLP."""
    return [
        *norm(f"{theirs}/LayerNorm_0", f"{ours}.attention_norm"),
        *attention(f"{theirs}/MultiHeadDotProductAttention_0", f"{ours}.attention"),
        *norm(f"{theirs}/LayerNorm_1", f"{ours}.mlp_norm"),
    ]


def block(theirs: str, ours: str, attention: Attention = attention) -> list[Rule]:
    """Transformer block."""
    return [*attention_half(theirs, ours, attention), *mlp(f"{theirs}/MlpBlock_0", f"{ours}.mlp")]


def encoder_sizes(shapes: Shapes, encoder: str, mlp: str = "MlpBlock_0") -> dict[str, Any]:
    """Sizes of an encoder, as fields of our configuration."""
    first = f"{encoder}/encoderblock_0"
    query = shapes[f"{first}/MultiHeadDotProductAttention_0/query/kernel"]
    return {
        "width": query[0],
        "depth": count_layers(shapes, f"{encoder}/encoderblock_{{}}/LayerNorm_0/scale"),
        "heads": query[1],
        "mlp_dim": shapes[f"{first}/{mlp}/Dense_0/kernel"][1],
    }
