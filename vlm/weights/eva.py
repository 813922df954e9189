"""EVA's vision towers inside open_clip folders: timm's EVA-01, EVA-02 and EVA-02-E.

None has a bias on its keys. EVA-02's MLP is gated, and its positions are rotary as well as learned
(Sun et al., 2023, arXiv:2303.15389; Fang et al., 2023, arXiv:2303.11331).
"""

import dataclasses
import re
from typing import Any

from vlm.config import ViTConfig
from vlm.weights import timm
from vlm.weights.layers import block, heads, norm, qkv
from vlm.weights.rules import FLAT, LINEAR, Rule, Shapes

NAMES = {
    re.compile(
        r"(eva_giant_patch14_(?:clip_)?224|eva02_base_patch16_clip_224|"
        r"eva02_large_patch14_clip_(?:224|336)|eva02_enormous_patch14_clip_224)(\..*)?$"
    ): {("token", None)}
}
READS = (
    "eva_giant_patch14_224 and eva02_{base_patch16,large_patch14,enormous_patch14}_clip_* with the "
    "class token and no extra projection"
)
_COMMON: dict[str, Any] = {
    "pool": "class", "class_token": True, "key_bias": False, "projection": "linear_bias",
    "activation": "gelu", "norm_eps": 1e-6,
}  # fmt: skip
# The rotary positions of EVA-02 are stretched to a grid of 16 rows.
_GATED: dict[str, Any] = _COMMON | {
    "mlp": "swiglu", "attention_norm": True, "rotary": 0, "rotary_span": 16,
    "rotary_rows_first": True,
}  # fmt: skip
_BRANCH: dict[str, Any] = _COMMON | {"norm": "branch"}
_SIZES = ("image_size", "patch_size", "width", "depth", "heads", "mlp_dim")
TOWERS = {
    name: ViTConfig(**dict(zip(_SIZES, sizes, strict=True)), **other)
    for name, sizes, other in (
        ("eva_giant_patch14_224", (224, 14, 1408, 40, 16, 6144), _COMMON),
        ("eva02_base_patch16_clip_224", (224, 16, 768, 12, 12, 2048), _GATED),
        ("eva02_large_patch14_clip_224", (224, 14, 1024, 24, 16, 2730), _GATED),
        ("eva02_large_patch14_clip_336", (336, 14, 1024, 24, 16, 2730), _GATED),
        ("eva02_enormous_patch14_clip_224", (224, 14, 1792, 64, 16, 15360), _BRANCH),
    )
}


def vision_config(
    name: str, image_size: int, pool: str, proj: str | None, shapes: Shapes
) -> ViTConfig:
    """Tower `name`, with the sizes that the `shapes` of its tensors have."""
    tower = TOWERS[name.partition(".")[0].replace("giant_patch14_clip", "giant_patch14")]
    sizes = timm.block_sizes(shapes, "fc1_x" if tower.mlp == "swiglu" else "fc1")
    return dataclasses.replace(tower, image_size=image_size, **sizes)


def options(c: ViTConfig) -> dict[str, str | None]:
    """Fields of a `vision_cfg` that make this tower."""
    name = timm.tower_name(c, TOWERS)
    return {"timm_model_name": name, "timm_pool": "token", "timm_proj": None}


def rules(c: ViTConfig) -> list[Rule]:
    """Rules of a tower."""
    theirs, ours = f"{timm.BLOCK}.attn", f"{timm.OURS}.attention"
    if c.attention_norm:
        attention = [
            *heads(f"{theirs}.q_proj", f"{ours}.query"),
            Rule(f"{theirs}.k_proj.weight", f"{ours}.key.kernel", LINEAR),
            *heads(f"{theirs}.v_proj", f"{ours}.value"),
            *norm(f"{theirs}.norm", f"{ours}.norm"),
        ]
    else:
        attention = [
            qkv(f"{theirs}.qkv.", f"{ours}.qkv")[0],  # there are no biases of this name
            Rule(f"{theirs}.q_bias", f"{ours}.query.bias", FLAT),
            Rule(f"{theirs}.v_bias", f"{ours}.value.bias", FLAT),
        ]
    names = {"attention_norm": "norm1", "attention.out": "attn.proj", "mlp_norm": "norm2"}
    if c.mlp == "swiglu":
        names |= {"mlp.gate": "mlp.fc1_g", "mlp.up": "mlp.fc1_x", "mlp.norm": "mlp.norm"}
    else:
        names |= {"mlp.up": "mlp.fc1"}
    layers = block(timm.BLOCK, timm.OURS, names | {"mlp.down": "mlp.fc2"})
    return timm.rules(c, blocks=[*attention, *layers])
