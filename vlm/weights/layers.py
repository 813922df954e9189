"""Rules of PyTorch layers, and of the transformer blocks that several families share."""

from collections.abc import Callable, Mapping

from vlm.weights.rules import CONV, FLAT, LINEAR, OUT, Rule, Transform

POINT = Transform(  # kernel of a 1x1 convolution, OIHW, to a matrix
    lambda s: (s[1], s[0], 1, 1),
    lambda x, s: x[:, :, 0, 0].T,
    lambda x: x.T[:, :, None, None],
)


def norm(theirs: str, ours: str) -> list[Rule]:
    """LayerNorm."""
    return [Rule(f"{theirs}.weight", f"{ours}.scale"), Rule(f"{theirs}.bias", f"{ours}.bias")]


def rms_norm(theirs: str, ours: str) -> list[Rule]:
    """RMSNorm."""
    return [Rule(f"{theirs}.weight", f"{ours}.scale")]


def linear(theirs: str, ours: str, *, bias: bool = True, kernel: Transform = LINEAR) -> list[Rule]:
    """Linear, or another layer with a kernel and a bias."""
    rules = [Rule(f"{theirs}.weight", f"{ours}.kernel", kernel)]
    return [*rules, Rule(f"{theirs}.bias", f"{ours}.bias")] if bias else rules


def heads(theirs: str, ours: str) -> list[Rule]:
    """Linear into the heads of an attention."""
    return [
        Rule(f"{theirs}.weight", f"{ours}.kernel", LINEAR),
        Rule(f"{theirs}.bias", f"{ours}.bias", FLAT),
    ]


def out(theirs: str, ours: str) -> list[Rule]:
    """Linear out of the heads of an attention."""
    return linear(theirs, ours, kernel=OUT)


def fused(theirs: str, ours: str, *parts: str) -> list[Rule]:
    """One Linear into the heads of several projections.

    Args:
        theirs: all that precedes "weight" and "bias" in their names, such as "attn.in_proj_".
        ours: name of our attention.
        parts: its projections, such as "query".
    """
    return [
        Rule(f"{theirs}weight", tuple(f"{ours}.{part}.kernel" for part in parts), LINEAR),
        Rule(f"{theirs}bias", tuple(f"{ours}.{part}.bias" for part in parts), FLAT),
    ]


def conv(theirs: str, ours: str, *, bias: bool = True) -> list[Rule]:
    """Conv2d."""
    return linear(theirs, ours, bias=bias, kernel=CONV)


def point(theirs: str, ours: str, *, bias: bool = True) -> list[Rule]:
    """Conv2d of 1x1 that is a linear layer in our model."""
    return linear(theirs, ours, bias=bias, kernel=POINT)


def batch_norm(theirs: str, ours: str) -> list[Rule]:
    """BatchNorm with its statistics."""
    return [
        *norm(theirs, ours),
        Rule(f"{theirs}.running_mean", f"{ours}.mean"),
        Rule(f"{theirs}.running_var", f"{ours}.var"),
    ]


def qkv(theirs: str, ours: str) -> list[Rule]:
    """One Linear into queries, keys and values; `ours` is the attention's name and ".qkv"."""
    return fused(theirs, ours.removesuffix(".qkv"), "query", "key", "value")


# Rules of a layer by the last part of our name; all others are norms.
_KINDS: dict[str, Callable[[str, str], list[Rule]]] = {
    "query": heads, "key": heads, "value": heads, "qkv": qkv, "out": out,
    "gate": linear, "up": linear, "down": linear,
    "attention_scale": lambda theirs, ours: [Rule(theirs, ours)],
    "mlp_scale": lambda theirs, ours: [Rule(theirs, ours)],
}  # fmt: skip

# Transformer blocks: our name of each layer, and theirs.
OPEN_CLIP = {
    "attention_norm": "ln_1", "attention.qkv": "attn.in_proj_", "attention.out": "attn.out_proj",
    "mlp_norm": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
}  # fmt: skip
TIMM_ATTENTION = {
    "attention_norm": "norm1", "attention.qkv": "attn.qkv.", "attention.out": "attn.proj",
    "mlp_norm": "norm2",
}  # fmt: skip
MLP = {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
TIMM = TIMM_ATTENTION | MLP
TRANSFORMERS = {
    "attention_norm": "layer_norm1", "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj", "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.out_proj", "mlp_norm": "layer_norm2", **MLP,
}  # fmt: skip
BERT = {
    "attention.query": "attention.self.query", "attention.key": "attention.self.key",
    "attention.value": "attention.self.value", "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm", "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense", "mlp_norm": "output.LayerNorm",
}  # fmt: skip


def block(theirs: str, ours: str, names: Mapping[str, str]) -> list[Rule]:
    """All layers of a block: `names` has their name of each, by ours."""
    return [
        rule
        for layer, name in names.items()
        for rule in _KINDS.get(layer.rpartition(".")[2], norm)(
            f"{theirs}.{name}", f"{ours}.{layer}"
        )
    ]
