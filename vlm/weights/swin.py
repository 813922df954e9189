"""Swin vision towers of open_clip folders, which are timm's."""

import math
import re
from typing import Any

from vlm.config import SwinConfig
from vlm.weights import timm_heads
from vlm.weights.layers import MLP, conv, fused, linear, norm, out
from vlm.weights.rules import Rule, Shapes, count_layers
from vlm.weights.timm import TRUNK, tower_name

NAMES = {
    re.compile(r"swin_(tiny|small|base|large)_patch4_window(7|12)_(\d+)(\..*)?$"): (
        timm_heads.MEANS
    )
}
READS = "swin_{tiny,small,base,large}_patch4_window* with the mean of the image and any projection"
# Depth of the third stage, and channels and heads of the first; both double in each stage.
_SIZES = {"tiny": (6, 96, 3), "small": (18, 96, 3), "base": (18, 128, 4), "large": (18, 192, 6)}
TOWERS = {
    f"swin_{size}_patch4_window{window}_{pixels}": SwinConfig(
        image_size=pixels,
        depths=(2, 2, depth, 2),
        widths=tuple(width * 2**stage for stage in range(4)),
        heads=tuple(heads * 2**stage for stage in range(4)),
        mlp_dims=tuple(4 * width * 2**stage for stage in range(4)),
        window=window,
    )
    for size, (depth, width, heads) in _SIZES.items()
    for window, pixels in ((7, 224), (12, 384))
    if pixels == 224 or size in ("base", "large")
}
_TABLE = "attn.relative_position_bias_table"


def vision_config(
    name: str, image_size: int, pool: str, proj: str | None, shapes: Shapes
) -> SwinConfig:
    """Tower `name`, with the sizes that the `shapes` of its tensors have."""
    count = count_layers(shapes, f"{TRUNK}.layers.{{}}.blocks.0.norm1.weight")
    stages = [f"{TRUNK}.layers.{stage}.blocks" for stage in range(max(1, count))]
    sizes = [shapes[f"{stage}.0.mlp.fc1.weight"] for stage in stages]
    window = (math.isqrt(shapes[f"{stages[0]}.0.{_TABLE}"][0]) + 1) // 2
    return SwinConfig(
        image_size=image_size,
        depths=tuple(count_layers(shapes, f"{stage}.{{}}.norm1.weight") for stage in stages),
        widths=tuple(width for _, width in sizes),
        heads=tuple(shapes[f"{stage}.0.{_TABLE}"][1] for stage in stages),
        mlp_dims=tuple(mlp_dim for mlp_dim, _ in sizes),
        window=window,
        projection=timm_heads.projection_of(proj, shapes),
    )


def options(c: SwinConfig) -> dict[str, Any]:
    """Fields of a `vision_cfg` that make this tower."""
    name = tower_name(c, TOWERS, free=["projection"])
    return {"timm_model_name": name, **timm_heads.options("mean", c.projection)}


def rules(c: SwinConfig, shapes: Shapes) -> list[Rule]:
    """Rules of a tower."""
    table = [
        *conv(f"{TRUNK}.patch_embed.proj", "vision.stem"),
        *norm(f"{TRUNK}.patch_embed.norm", "vision.stem_norm"),
    ]
    for number in range(len(c.depths)):
        theirs, ours = f"{TRUNK}.layers.{number}", f"vision.stages.{number}"
        if number:
            before, merging = f"{theirs}.downsample", f"{ours}.merging"
            table += norm(f"{before}.norm", f"{merging}.norm")
            table += linear(f"{before}.reduction", f"{merging}.reduction", bias=False)
        for first, name in enumerate(("plain", "shifted")):
            layers = _block(f"{theirs}.blocks.{{}}", f"{ours}.blocks.{name}")
            table += [
                Rule(rule.theirs, rule.ours, rule.transform, first, step=2) for rule in layers
            ]
    table += norm(f"{TRUNK}.norm", "vision.norm")
    return table + timm_heads.projection_rules(c.projection, f"{TRUNK}.head.fc", shapes)


def _block(theirs: str, ours: str) -> list[Rule]:
    return [
        *norm(f"{theirs}.norm1", f"{ours}.attention_norm"),
        Rule(f"{theirs}.{_TABLE}", f"{ours}.attention.relative_position_bias"),
        *fused(f"{theirs}.attn.qkv.", f"{ours}.attention", "query", "key", "value"),
        *out(f"{theirs}.attn.proj", f"{ours}.attention.out"),
        *norm(f"{theirs}.norm2", f"{ours}.mlp_norm"),
        *(
            rule
            for layer, name in MLP.items()
            for rule in linear(f"{theirs}.{name}", f"{ours}.{layer}")
        ),
    ]
