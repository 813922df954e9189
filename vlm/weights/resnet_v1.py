"""timm's ResNets as vision towers of open_clip folders."""

import re
from typing import Any

from vlm.config import ResNetV1Config
from vlm.weights import timm_heads
from vlm.weights.layers import batch_norm, conv
from vlm.weights.rules import Rule, Shapes, count_layers
from vlm.weights.timm import TRUNK, tower_name

NAMES = {re.compile(r"resnet(18|26|34|50|101|152)(\..*)?$"): timm_heads.ALL}
READS = "resnet{18,26,34,50,101,152} with the pools avg, abs_attn and rot_attn and any projection"
TOWERS = {
    f"resnet{name}": ResNetV1Config(depths=depths, bottleneck=name not in ("18", "34"))
    for name, depths in {
        "18": (2, 2, 2, 2), "34": (3, 4, 6, 3), "26": (2, 2, 2, 2), "50": (3, 4, 6, 3),
        "101": (3, 4, 23, 3), "152": (3, 8, 36, 3),
    }.items()
}  # fmt: skip


def vision_config(
    name: str, image_size: int, pool: str, proj: str | None, shapes: Shapes
) -> ResNetV1Config:
    """Tower `name`, with the sizes that the `shapes` of its tensors have."""
    bottleneck = TOWERS[name.partition(".")[0]].bottleneck
    stages = [f"{TRUNK}.layer{stage}.{{}}.conv1.weight" for stage in range(1, 5)]
    return ResNetV1Config(
        image_size=image_size,
        depths=tuple(count_layers(shapes, stage) for stage in stages),
        stem_width=shapes[f"{TRUNK}.conv1.weight"][0],
        bottleneck=bottleneck,
        pool=timm_heads.pool_of(pool),
        projection=timm_heads.projection_of(proj, shapes, pool),
    )


def options(c: ResNetV1Config) -> dict[str, Any]:
    """Fields of a `vision_cfg` that make this tower."""
    name = tower_name(c, TOWERS, free=["image_size", "pool", "projection"])
    return {"timm_model_name": name, **timm_heads.options(c.pool, c.projection)}


def rules(c: ResNetV1Config, shapes: Shapes) -> list[Rule]:
    """Rules of a tower."""
    table = [
        *conv(f"{TRUNK}.conv1", "vision.stem", bias=False),
        *batch_norm(f"{TRUNK}.bn1", "vision.stem_norm"),
    ]
    count = 3 if c.bottleneck else 2
    for number, depth in enumerate(c.depths):
        theirs, ours = f"{TRUNK}.layer{number + 1}", f"vision.stages.{number}"
        table += _block(f"{theirs}.0", f"{ours}.first", count)
        if number or c.bottleneck:
            table += conv(f"{theirs}.0.downsample.0", f"{ours}.first.shortcut.conv", bias=False)
            table += batch_norm(f"{theirs}.0.downsample.1", f"{ours}.first.shortcut.norm")
        if depth > 1:
            rest = _block(f"{theirs}.{{}}", f"{ours}.blocks", count)
            table += [Rule(rule.theirs, rule.ours, rule.transform, first=1) for rule in rest]
    table += timm_heads.pool_rules(c.pool)
    return table + timm_heads.projection_rules(c.projection, f"{TRUNK}.fc", shapes)


def _block(theirs: str, ours: str, count: int) -> list[Rule]:
    table = []
    for layer in range(1, count + 1):
        table += conv(f"{theirs}.conv{layer}", f"{ours}.conv{layer}", bias=False)
        table += batch_norm(f"{theirs}.bn{layer}", f"{ours}.norm{layer}")
    return table
