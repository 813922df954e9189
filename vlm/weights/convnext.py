"""ConvNeXt vision towers of open_clip folders, which are timm's."""

import re
from typing import Any, cast

from vlm.config import ConvNeXtConfig
from vlm.weights import timm_heads
from vlm.weights.layers import conv, linear, norm
from vlm.weights.rules import Rule, Shapes, count_layers
from vlm.weights.timm import TRUNK, tower_name

NAMES = {re.compile(r"convnext_(tiny|small|base|large|xlarge|xxlarge)(\..*)?$"): timm_heads.ALL}
READS = (
    "convnext_{tiny,small,base,large,xlarge,xxlarge} with the pools avg, abs_attn and rot_attn and "
    "any projection"
)

# Blocks and channels of the stages. The MLPs are four times as wide.
TOWERS = {
    f"convnext_{size}": ConvNeXtConfig(
        depths=depths,
        widths=tuple(width * times for times in (1, 2, 4, 8)),
        mlp_dims=tuple(4 * width * times for times in (1, 2, 4, 8)),
        norm_eps=1e-5 if size == "xxlarge" else 1e-6,
    )
    for size, depths, width in (
        ("tiny", (3, 3, 9, 3), 96),
        ("small", (3, 3, 27, 3), 96),
        ("base", (3, 3, 27, 3), 128),
        ("large", (3, 3, 27, 3), 192),
        ("xlarge", (3, 3, 27, 3), 256),
        ("xxlarge", (3, 4, 30, 3), 384),
    )
}
_OURS = {"mlp_bias": "mlp"}  # in a ConvNeXtConfig


def vision_config(
    name: str, image_size: int, pool: str, proj: Any, shapes: Shapes
) -> ConvNeXtConfig:
    """Tower `name`, with the sizes that the `shapes` of its tensors have."""
    count = count_layers(shapes, f"{TRUNK}.stages.{{}}.blocks.0.norm.weight")
    stages = [f"{TRUNK}.stages.{stage}.blocks" for stage in range(max(1, count))]
    sizes = [shapes[f"{stage}.0.mlp.fc1.weight"] for stage in stages]
    projection = timm_heads.projection_of(proj, shapes, pool)
    return ConvNeXtConfig(
        image_size=image_size,
        depths=tuple(count_layers(shapes, f"{stage}.{{}}.norm.weight") for stage in stages),
        widths=tuple(width for _, width in sizes),
        mlp_dims=tuple(mlp_dim for mlp_dim, _ in sizes),
        norm_eps=TOWERS[name.partition(".")[0]].norm_eps,
        projection=cast(Any, _OURS.get(projection, projection)),
        pool=timm_heads.pool_of(pool),
    )


def options(c: ConvNeXtConfig) -> dict[str, Any]:
    """Fields of a `vision_cfg` that make this tower."""
    name = tower_name(c, TOWERS, free=["image_size", "pool", "projection"])
    theirs = {ours: name for name, ours in _OURS.items()}
    projection = theirs.get(c.projection, c.projection)
    return {"timm_model_name": name, **timm_heads.options(c.pool, projection)}


def rules(c: ConvNeXtConfig, shapes: Shapes) -> list[Rule]:
    """Rules of a tower."""
    table = [
        *conv(f"{TRUNK}.stem.0", "vision.stem"),
        *norm(f"{TRUNK}.stem.1", "vision.stem_norm"),
    ]
    for number in range(len(c.depths)):
        theirs, ours = f"{TRUNK}.stages.{number}", f"vision.stages.{number}"
        if number:
            table += norm(f"{theirs}.downsample.0", f"{ours}.halve_norm")
            table += conv(f"{theirs}.downsample.1", f"{ours}.halve")
        block = f"{theirs}.blocks.{{}}"
        table += conv(f"{block}.conv_dw", f"{ours}.blocks.conv")
        table += norm(f"{block}.norm", f"{ours}.blocks.norm")
        table += linear(f"{block}.mlp.fc1", f"{ours}.blocks.mlp.up")
        table += linear(f"{block}.mlp.fc2", f"{ours}.blocks.mlp.down")
        table.append(Rule(f"{block}.gamma", f"{ours}.blocks.scale"))
    table += norm(f"{TRUNK}.head.norm", "vision.norm")
    table += timm_heads.pool_rules(c.pool)
    if c.projection == "mlp":
        table += linear("visual.head.mlp.fc1", "vision.hidden")
        return table + linear("visual.head.mlp.fc2", "vision.projection", bias=False)
    return table + timm_heads.projection_rules(c.projection, f"{TRUNK}.head.fc", shapes)
