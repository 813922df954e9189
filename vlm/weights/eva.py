"""EVA's vision towers inside open_clip folders: EVA-01, EVA-02 and EVA-02-E, which are timm's.

None has a bias on its keys. EVA-02's MLP is gated, and its positions are rotary as well as learned
(Sun et al., 2023, arXiv:2303.15389; Fang et al., 2023, arXiv:2303.11331).
"""

import dataclasses
import re
from collections.abc import Mapping

from vlm.config import VisionTowerConfig, ViTConfig
from vlm.errors import CheckpointError
from vlm.weights.fields import first_group
from vlm.weights.layers import linear, norm, out
from vlm.weights.rules import CONV, FLAT, LINEAR, Rule, leading
from vlm.weights.timm import block_count

NAME = re.compile(
    r"(eva_giant_patch14_(?:clip_)?224|eva02_(?:base|large|enormous)_patch\d+_clip_\d+)(\..*)?$"
)
READS = "eva_giant_patch14_224 and eva02_*_clip_* with the class token"
_TRUNK, _BLOCK, _OURS = "visual.trunk", "visual.trunk.blocks.{}", "vision.transformer.blocks"
_SPAN = 16  # rows of the grid that EVA-02's rotary positions are stretched to
_COMMON = {
    "pool": "class",
    "class_token": True,
    "key_bias": False,
    "projection": "linear_bias",
    "activation": "gelu",
    "norm_eps": 1e-6,
}
_PLAIN = _COMMON | {"mlp": "plain"}
_GATED = _COMMON | {
    "mlp": "swiglu",
    "attention_norm": True,
    "rotary": 0,
    "rotary_span": _SPAN,
    "rotary_rows_first": True,
}
# timm's names: image size, patch size, width, depth, heads, width of the MLP, and what else.
_TOWERS = {
    "eva_giant_patch14_224": (224, 14, 1408, 40, 16, 6144, _PLAIN),
    "eva02_base_patch16_clip_224": (224, 16, 768, 12, 12, 2048, _GATED),
    "eva02_large_patch14_clip_224": (224, 14, 1024, 24, 16, 2730, _GATED),
    "eva02_large_patch14_clip_336": (336, 14, 1024, 24, 16, 2730, _GATED),
    "eva02_enormous_patch14_clip_224": (
        224, 14, 1792, 64, 16, 15360, _PLAIN | {"norm": "branch"},
    ),
}  # fmt: skip


def _tower(name: str) -> ViTConfig:
    image_size, patch_size, width, depth, heads, mlp_dim, other = _TOWERS[name]
    return ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        depth=depth,
        heads=heads,
        mlp_dim=mlp_dim,
        **other,
    )


def vision_config(
    name: str,
    image_size: int,
    pool: str,
    proj: str | None,
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
) -> ViTConfig:
    """The tower `name`, with the sizes that the `shapes` of its tensors have.

    Raises:
        CheckpointError: another pool or projection, a name that timm lacks, or other weights.
    """
    name = first_group(NAME, name).replace("giant_patch14_clip", "giant_patch14")  # of one form
    if (pool, proj) != ("token", None) or name not in _TOWERS:
        raise CheckpointError(
            f"{where}: the vision tower {name!r} has timm_pool {pool!r} and timm_proj {proj!r}: "
            f"vlm reads {', '.join(_TOWERS)} with the class token and no extra projection"
        )
    tower = _tower(name)
    up = "fc1_x" if tower.mlp == "swiglu" else "fc1"
    try:
        width, _, patch_size, _ = shapes[f"{_TRUNK}.patch_embed.proj.weight"]
        mlp_dim = shapes[f"{_TRUNK}.blocks.0.mlp.{up}.weight"][0]
    except (KeyError, ValueError):
        raise CheckpointError(f"{where}: the weights are not those of timm's {name}") from None
    depth = block_count(shapes)
    return dataclasses.replace(
        tower,
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        depth=depth,
        mlp_dim=mlp_dim,
    )


def owns(config: VisionTowerConfig) -> bool:
    """Whether a tower is one of these."""
    return isinstance(config, ViTConfig) and not config.key_bias


def options(c: ViTConfig) -> dict[str, str | None]:
    """The fields of a `vision_cfg` that make this tower of timm's.

    Raises:
        CheckpointError: timm has no name for it.
    """
    for name in _TOWERS:
        if dataclasses.replace(c, dropout=0.0, patch_dropout=0.0) == _tower(name):
            return {"timm_model_name": name, "timm_pool": "token", "timm_proj": None}
    raise CheckpointError(
        f"timm has no EVA of width {c.width}, depth {c.depth} and image_size {c.image_size} with "
        "these blocks: save the model as a vlm bundle instead"
    )


def rules(c: ViTConfig) -> list[Rule]:
    """The table of a tower."""
    attention = f"{_OURS}.attention"
    names = ("query", "key", "value")
    if c.attention_norm:
        projections = [
            Rule(f"{_BLOCK}.attn.{name[0]}_proj.weight", f"{attention}.{name}.kernel", LINEAR)
            for name in names
        ]
        biases, ends = (
            ("q_proj.bias", "v_proj.bias"),
            norm(f"{_BLOCK}.attn.norm", f"{attention}.norm"),
        )
    else:
        kernels = tuple(f"{attention}.{name}.kernel" for name in names)
        projections = [Rule(f"{_BLOCK}.attn.qkv.weight", kernels, LINEAR)]
        biases, ends = ("q_bias", "v_bias"), []
    if c.mlp == "swiglu":
        mlp = [
            *linear(f"{_BLOCK}.mlp.fc1_g", f"{_OURS}.mlp.gate"),
            *linear(f"{_BLOCK}.mlp.fc1_x", f"{_OURS}.mlp.up"),
            *norm(f"{_BLOCK}.mlp.norm", f"{_OURS}.mlp.norm"),
        ]
    else:
        mlp = linear(f"{_BLOCK}.mlp.fc1", f"{_OURS}.mlp.up")
    return [
        Rule(f"{_TRUNK}.cls_token", "vision.class_token", leading(2)),
        Rule(f"{_TRUNK}.pos_embed", "vision.position", leading(1)),
        Rule(f"{_TRUNK}.patch_embed.proj.weight", "vision.stem.kernel", CONV),
        Rule(f"{_TRUNK}.patch_embed.proj.bias", "vision.stem.bias"),
        *norm(f"{_BLOCK}.norm1", f"{_OURS}.attention_norm"),
        *projections,
        Rule(f"{_BLOCK}.attn.{biases[0]}", f"{attention}.query.bias", FLAT),
        Rule(f"{_BLOCK}.attn.{biases[1]}", f"{attention}.value.bias", FLAT),
        *ends,
        *out(f"{_BLOCK}.attn.proj", f"{attention}.out"),
        *norm(f"{_BLOCK}.norm2", f"{_OURS}.mlp_norm"),
        *mlp,
        *linear(f"{_BLOCK}.mlp.fc2", f"{_OURS}.mlp.down"),
        *norm(f"{_TRUNK}.norm", "vision.norm"),
        *linear(f"{_TRUNK}.head", "vision.projection"),
    ]
