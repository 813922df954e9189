"""MobileCLIP-B's vision tower inside open_clip folders: timm's ViT with a stem of three layers."""

import dataclasses
import math
import re

from vlm.config import ViTConfig
from vlm.weights import timm
from vlm.weights.layers import batch_norm
from vlm.weights.rules import CONV, WITHOUT_FIRST, Rule, Shapes, count_layers

NAMES = {re.compile(r"(vit_base_mci_224)(\..*)?$"): {("token", None)}}
READS = "vit_base_mci_224 with the class token and no extra projection"
_STEM = f"{timm.TRUNK}.patch_embed.backbone"
TOWERS = {
    "vit_base_mci_224": ViTConfig(
        stem="nested",
        stem_widths=(192, 192),
        pool="class",
        class_token=True,
        projection="linear_bias",
        activation="gelu",
    )
}


def vision_config(
    name: str, image_size: int, pool: str, proj: str | None, shapes: Shapes
) -> ViTConfig:
    """Tower `name`, with the sizes that the `shapes` of its tensors have."""
    kernels = [shapes[f"{_STEM}.{number}.conv.weight"] for number in range(3)]
    return dataclasses.replace(
        TOWERS["vit_base_mci_224"],
        image_size=image_size,
        patch_size=math.prod(kernel[2] for kernel in kernels),
        stem_widths=(kernels[0][0], kernels[1][0]),
        width=kernels[2][0],
        depth=count_layers(shapes, f"{timm.BLOCK}.norm1.weight"),
        mlp_dim=shapes[f"{timm.TRUNK}.blocks.0.mlp.fc1.weight"][0],
    )


def options(c: ViTConfig) -> dict[str, str | None]:
    """Fields of a `vision_cfg` that make this tower."""
    name = timm.tower_name(c, TOWERS)
    return {"timm_model_name": name, "timm_pool": "token", "timm_proj": None}


def rules(c: ViTConfig) -> list[Rule]:
    """Rules of a tower."""
    stem = [Rule(f"{_STEM}.2.conv.bias", "vision.stem.bias")]
    for i in range(3):
        stem.append(Rule(f"{_STEM}.{i}.conv.weight", f"vision.stem.kernels.{i}", CONV))
        if i < 2:
            stem += batch_norm(f"{_STEM}.{i}.bn", f"vision.stem.norms.{i}")
    position = Rule(f"{timm.TRUNK}.pos_embed", "vision.position", WITHOUT_FIRST)
    return timm.rules(c, stem, position=position)
