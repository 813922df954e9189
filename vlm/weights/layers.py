"""Rules for the layers that every family from torch is made of."""

from vlm.weights.rules import FLAT, LINEAR, OUT, Rule


def norm(theirs: str, ours: str) -> list[Rule]:
    """A torch LayerNorm."""
    return [Rule(f"{theirs}.weight", f"{ours}.scale"), Rule(f"{theirs}.bias", f"{ours}.bias")]


def linear(theirs: str, ours: str, *, bias: bool = True) -> list[Rule]:
    """A torch Linear."""
    rules = [Rule(f"{theirs}.weight", f"{ours}.kernel", LINEAR)]
    return [*rules, Rule(f"{theirs}.bias", f"{ours}.bias")] if bias else rules


def heads(theirs: str, ours: str) -> list[Rule]:
    """A torch Linear into the heads of an attention."""
    return [
        Rule(f"{theirs}.weight", f"{ours}.kernel", LINEAR),
        Rule(f"{theirs}.bias", f"{ours}.bias", FLAT),
    ]


def out(theirs: str, ours: str) -> list[Rule]:
    """A torch Linear out of the heads of an attention."""
    return [Rule(f"{theirs}.weight", f"{ours}.kernel", OUT), Rule(f"{theirs}.bias", f"{ours}.bias")]


def fused(weight: str, bias: str, ours: str, parts: tuple[str, ...]) -> list[Rule]:
    """One torch matrix into the heads of several projections, such as `in_proj_weight`."""
    return [
        Rule(weight, tuple(f"{ours}.{part}.kernel" for part in parts), LINEAR),
        Rule(bias, tuple(f"{ours}.{part}.bias" for part in parts), FLAT),
    ]
