"""SigLIP 2's NaFlex vision towers inside open_clip folders: timm's NaFlexVit (arXiv:2502.14786).

The weights are those of transformers' Siglip2 towers. A config gives the number of patches as
`image_seq_len`, or as those of a square of `image_size`.
"""

import dataclasses
import math
import re
from typing import Any

from vlm.config import VisionTowerConfig, ViTConfig
from vlm.errors import CheckpointError, brief
from vlm.weights import timm
from vlm.weights.fields import integer
from vlm.weights.rules import OUT, Rule, Shapes, Transform, count_layers

NAMES = {re.compile(r"naflexvit_(base|so400m)_patch16_siglip(\..*)?$"): {("map", "none")}}
READS = "naflexvit_{base,so400m}_patch16_siglip with attention pooling and no projection"
_EMBEDS = f"{timm.TRUNK}.embeds"
TOWERS = {
    f"naflexvit_{name}_patch16_siglip": ViTConfig(
        image_size=256,  # of the grid of positions
        patch_size=16,
        max_patches=256,
        width=width,
        depth=depth,
        heads=heads,
        mlp_dim=mlp_dim,
        pool="map",
        activation="gelu_tanh",
    )
    for name, (width, depth, heads, mlp_dim) in (
        ("base", (768, 12, 12, 3072)),
        ("so400m", (1152, 27, 16, 4304)),
    )
}
_GRID = Transform(  # (1, g, g, d); ours (g * g, d)
    lambda s: (1, math.isqrt(s[0]), math.isqrt(s[0]), s[1]),
    lambda x, s: x.reshape(s),
    lambda x: x.reshape(1, math.isqrt(len(x)), -1, x.shape[-1]),
)


def vision_config(
    name: str, image_size: int, pool: str, proj: str | None, shapes: Shapes
) -> ViTConfig:
    """Tower `name`, with the sizes that the `shapes` of its tensors have."""
    width, inputs = shapes[f"{_EMBEDS}.proj.weight"]
    patch_size = math.isqrt(inputs // 3)
    return dataclasses.replace(
        TOWERS[name.partition(".")[0]],
        image_size=shapes[f"{_EMBEDS}.pos_embed"][1] * patch_size,
        patch_size=patch_size,
        max_patches=(image_size // patch_size) ** 2,
        width=width,
        depth=count_layers(shapes, f"{timm.BLOCK}.norm1.weight"),
        mlp_dim=shapes[f"{timm.TRUNK}.blocks.0.mlp.fc1.weight"][0],
    )


def with_length(tower: VisionTowerConfig, length: Any, where: str) -> ViTConfig:
    """Tower for images of as many patches as `image_seq_len` says.

    Raises:
        CheckpointError: another kind of tower.
    """
    if not isinstance(tower, ViTConfig) or tower.max_patches is None:
        raise CheckpointError(
            f"{where} is {brief(length)}, a number of patches, and this is no NaFlex tower"
        )
    return dataclasses.replace(tower, max_patches=integer(length, where))


def options(c: ViTConfig) -> dict[str, Any]:
    """Fields of a `vision_cfg` that make this tower."""
    assert c.max_patches is not None
    return {
        "timm_model_name": timm.tower_name(c, TOWERS, free=["max_patches"]),
        "timm_pool": "map",
        "timm_proj": "none",
        "image_size": math.isqrt(c.max_patches) * c.patch_size,
        "image_seq_len": c.max_patches,
    }


def rules(c: ViTConfig) -> list[Rule]:
    """Rules of a tower."""
    stem = [
        Rule(f"{_EMBEDS}.proj.weight", "vision.stem.kernel", OUT),
        Rule(f"{_EMBEDS}.proj.bias", "vision.stem.bias"),
    ]
    return timm.rules(c, stem, position=Rule(f"{_EMBEDS}.pos_embed", "vision.position", _GRID))
