"""ViTamin vision towers of open_clip folders, which are timm's."""

import re
from typing import Any

from vlm.config import ViTaminConfig
from vlm.weights.layers import TIMM_ATTENTION, block, conv, linear, norm, point
from vlm.weights.rules import Rule, Shapes, count_layers, leading
from vlm.weights.timm import BLOCK, OURS, TRUNK, tower_name

_NAME = re.compile(r"vitamin_(small|base|large|large2|xlarge)_(\d+)(\..*)?$")
NAMES = {_NAME: {(pool, proj) for pool in ("", "avg") for proj in ("none", "linear")}}
READS = "vitamin_* with the mean of the image and the projections none and linear"
_STEM = f"{TRUNK}.patch_embed.backbone"

# Channels of the stem and of its two stages, width, depth and heads of the blocks, and the image
# sizes for which timm has a name.
_SIZES = {
    "small": (64, (64, 128), 384, 14, 6, (224,)),
    "base": (128, (128, 256), 768, 14, 12, (224,)),
    "large": (160, (160, 320), 1024, 31, 16, (224, 256, 336, 384)),
    "large2": (160, (160, 320), 1024, 31, 16, ()),
    "xlarge": (192, (192, 384), 1152, 32, 16, (256, 336, 384)),
}
TOWERS = {
    f"vitamin_{size}_{image_size}": ViTaminConfig(
        image_size=image_size,
        stem_width=stem_width,
        conv_widths=conv_widths,
        conv_depths=(2, 4),
        width=width,
        depth=depth,
        heads=heads,
        mlp_dim=2 * width,
        position=size != "xlarge",
        norm_eps=1e-6,
    )
    for size, (stem_width, conv_widths, width, depth, heads, pixels) in _SIZES.items()
    for image_size in pixels
}


def vision_config(
    name: str, image_size: int, pool: str, proj: Any, shapes: Shapes
) -> ViTaminConfig:
    """Tower `name`, with the sizes that the `shapes` of its tensors have."""
    match = _NAME.match(name)
    assert match is not None
    stages = [f"{_STEM}.stages.{stage}" for stage in (0, 1)]
    widths = [shapes[f"{stage}.0.conv3_1x1.weight"][0] for stage in stages]
    depths = [count_layers(shapes, f"{stage}.{{}}.pre_norm.weight") for stage in stages]
    return ViTaminConfig(
        image_size=image_size,
        stem_width=shapes[f"{_STEM}.stem.conv1.weight"][0],
        conv_widths=(widths[0], widths[1]),
        conv_depths=(depths[0], depths[1]),
        width=shapes[f"{_STEM}.pool.proj.weight"][0],
        depth=count_layers(shapes, f"{BLOCK}.norm1.weight"),
        heads=_SIZES[match[1]][4],
        mlp_dim=shapes[f"{TRUNK}.blocks.0.mlp.w0.weight"][0],
        position=f"{TRUNK}.pos_embed" in shapes,
        projection=proj,
    )


def options(c: ViTaminConfig) -> dict[str, str | None]:
    """Fields of a `vision_cfg` that make this tower."""
    name = tower_name(c, TOWERS, free=["projection"])
    return {"timm_model_name": name, "timm_pool": "", "timm_proj": c.projection}


def rules(c: ViTaminConfig) -> list[Rule]:
    """Rules of a tower."""
    table = [
        *conv(f"{_STEM}.stem.conv1", "vision.stem.conv1"),
        *norm(f"{_STEM}.stem.norm1", "vision.stem.norm1"),
        *conv(f"{_STEM}.stem.conv2", "vision.stem.conv2"),
    ]
    inputs = c.stem_width
    for stage, (width, depth) in enumerate(zip(c.conv_widths, c.conv_depths, strict=True)):
        for number in range(depth):
            theirs = f"{_STEM}.stages.{stage}.{number}"
            ours = f"vision.stem.stages.{stage}.{number}"
            if width != inputs:
                table += point(f"{theirs}.shortcut.expand", f"{ours}.shortcut")
            table += norm(f"{theirs}.pre_norm", f"{ours}.norm")
            table += point(f"{theirs}.conv1_1x1", f"{ours}.widen")
            table += conv(f"{theirs}.conv2_kxk", f"{ours}.conv")
            table += point(f"{theirs}.conv3_1x1", f"{ours}.narrow")
            inputs = width
    gated = {"mlp.norm": "mlp.norm", "mlp.gate": "mlp.w0", "mlp.up": "mlp.w1", "mlp.down": "mlp.w2"}
    head = linear("visual.head.proj", "vision.projection", bias=False)
    return [
        *table,
        *norm(f"{_STEM}.pool.norm", "vision.stem.last_norm"),
        *conv(f"{_STEM}.pool.proj", "vision.stem.last"),
        *([Rule(f"{TRUNK}.pos_embed", "vision.position", leading(1))] if c.position else []),
        *block(BLOCK, OURS, TIMM_ATTENTION | gated),
        *norm(f"{TRUNK}.fc_norm", "vision.norm"),
        *(head if c.projection == "linear" else []),
    ]
