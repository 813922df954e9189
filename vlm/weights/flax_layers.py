"""Rules for the layers that every family from flax is made of; names of theirs are paths."""

from vlm.weights.rules import Rule


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


def mlp(theirs: str, ours: str) -> list[Rule]:
    """The MLP of big_vision and scenic."""
    return [
        *dense(f"{theirs}/Dense_0", f"{ours}.up"),
        *dense(f"{theirs}/Dense_1", f"{ours}.down"),
    ]
