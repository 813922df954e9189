"""Rules for the layers that every family from torch is made of."""

from vlm.weights.rules import CONV, FLAT, LINEAR, OUT, Rule, Transform

POINT = Transform(  # a 1x1 convolution of torch's, OIHW, ours a matrix
    lambda s: (s[1], s[0], 1, 1),
    lambda x, s: x[:, :, 0, 0].T,
    lambda x: x.T[:, :, None, None],
)


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


def conv(theirs: str, ours: str, *, bias: bool = True) -> list[Rule]:
    """A torch Conv2d."""
    rules = [Rule(f"{theirs}.weight", f"{ours}.kernel", CONV)]
    return [*rules, Rule(f"{theirs}.bias", f"{ours}.bias")] if bias else rules


def point(theirs: str, ours: str, *, bias: bool = True) -> list[Rule]:
    """A torch Conv2d of 1x1 that is a Linear of ours."""
    rules = [Rule(f"{theirs}.weight", f"{ours}.kernel", POINT)]
    return [*rules, Rule(f"{theirs}.bias", f"{ours}.bias")] if bias else rules


def batch_norm(theirs: str, ours: str) -> list[Rule]:
    """A torch BatchNorm with its statistics."""
    return [
        *norm(theirs, ours),
        Rule(f"{theirs}.running_mean", f"{ours}.mean"),
        Rule(f"{theirs}.running_var", f"{ours}.var"),
    ]
