"""MobileCLIP-B's vision tower inside open_clip folders: timm's ViT with patches of patches."""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from vlm.config import VisionTowerConfig, ViTConfig
from vlm.errors import CheckpointError
from vlm.weights.layers import batch_norm, linear, norm
from vlm.weights.rules import CONV, WITHOUT_FIRST, Rule, leading
from vlm.weights.timm import attention_rules, block_count

NAME = re.compile(r"(vit_base_mci_224)(\..*)?$")
READS = "vit_base_mci_224 with the class token"
_TRUNK, _STEM = "visual.trunk", "visual.trunk.patch_embed.backbone"
_TOWER = ViTConfig(
    stem="nested",
    stem_widths=(192, 192),
    pool="class",
    class_token=True,
    projection="linear_bias",
    activation="gelu",
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
        CheckpointError: another pool or projection, or the weights of something else.
    """
    if (pool, proj) != ("token", None):
        raise CheckpointError(
            f"{where}: the vision tower {name!r} has timm_pool {pool!r} and timm_proj {proj!r}: "
            "vlm reads it with the class token and no extra projection"
        )
    try:
        kernels = [shapes[f"{_STEM}.{number}.conv.weight"] for number in range(3)]
        mlp_dim = shapes[f"{_TRUNK}.blocks.0.mlp.fc1.weight"][0]
    except KeyError:
        raise CheckpointError(f"{where}: the weights are not those of timm's {name}") from None
    depth = block_count(shapes)
    return dataclasses.replace(
        _TOWER,
        image_size=image_size,
        patch_size=int(np.prod([kernel[2] for kernel in kernels])),
        stem_widths=(kernels[0][0], kernels[1][0]),
        width=kernels[2][0],
        depth=depth,
        mlp_dim=mlp_dim,
    )


def owns(config: VisionTowerConfig) -> bool:
    """Whether a tower is one of these."""
    return isinstance(config, ViTConfig) and config.stem == "nested"


def options(c: ViTConfig) -> dict[str, str | None]:
    """The fields of a `vision_cfg` that make this tower of timm's.

    Raises:
        CheckpointError: timm has no name for it.
    """
    if dataclasses.replace(c, dropout=0.0, patch_dropout=0.0) != _TOWER:
        raise CheckpointError(
            "timm has one ViT with nested patches, MobileCLIP-B's, and the model's is another: "
            "save the model as a vlm bundle instead"
        )
    return {"timm_model_name": "vit_base_mci_224", "timm_pool": "token", "timm_proj": None}


def rules(c: ViTConfig) -> list[Rule]:
    """The table of a tower."""
    stem = []
    for number in range(3):
        theirs = f"{_STEM}.{number}"
        stem.append(Rule(f"{theirs}.conv.weight", f"vision.stem.kernels.{number}", CONV))
        if number < 2:
            stem += batch_norm(f"{theirs}.bn", f"vision.stem.norms.{number}")
    block, ours = f"{_TRUNK}.blocks.{{}}", "vision.transformer.blocks"
    return [
        *stem,
        Rule(f"{_STEM}.2.conv.bias", "vision.stem.bias"),
        Rule(f"{_TRUNK}.cls_token", "vision.class_token", leading(2)),
        Rule(f"{_TRUNK}.pos_embed", "vision.position", WITHOUT_FIRST),
        *attention_rules(),
        *linear(f"{block}.mlp.fc1", f"{ours}.mlp.up"),
        *linear(f"{block}.mlp.fc2", f"{ours}.mlp.down"),
        *norm(f"{_TRUNK}.norm", "vision.norm"),
        *linear(f"{_TRUNK}.head", "vision.projection"),
    ]
