"""timm's EfficientNets as vision towers of open_clip folders."""

import dataclasses
import math
import re
from typing import Any

from vlm.config import EfficientNetConfig, EfficientNetStage
from vlm.weights import timm_heads
from vlm.weights.layers import batch_norm, conv, point
from vlm.weights.rules import Rule, Shapes, count_layers
from vlm.weights.timm import TRUNK, tower_name

NAMES = {re.compile(r"(tf_)?efficientnet_b[0-7](\..*)?$"): timm_heads.ALL}
READS = (
    "efficientnet_b0 to b7 and tf_efficientnet_b0 to b7 with the pools avg, abs_attn and rot_attn "
    "and any projection"
)
_SCALES = {  # of the channels and of the depths
    "b0": (1.0, 1.0), "b1": (1.0, 1.1), "b2": (1.1, 1.2), "b3": (1.2, 1.4), "b4": (1.4, 1.8),
    "b5": (1.6, 2.2), "b6": (1.8, 2.6), "b7": (2.0, 3.1),
}  # fmt: skip


def _channels(count: int, scale: float) -> int:
    """Scale a number of channels to a multiple of 8, by at most a tenth less."""
    rounded = max(8, int(count * scale + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * count * scale else rounded


def padded(c: EfficientNetConfig, *, tensorflow: bool) -> EfficientNetConfig:
    """Tower with the padding of its kind: TensorFlow's depends on the sides of the images."""
    if not tensorflow:
        halving = tuple(dataclasses.replace(s, symmetric=s.halve) for s in c.stages)
        return dataclasses.replace(c, stages=halving, symmetric=True)
    return c.tensorflow_padded()


def _tower(scales: tuple[float, float], *, tensorflow: bool) -> EfficientNetConfig:
    plain = EfficientNetConfig()
    stages = (
        dataclasses.replace(
            stage, width=_channels(stage.width, scales[0]), depth=math.ceil(stage.depth * scales[1])
        )
        for stage in plain.stages
    )
    config = EfficientNetConfig(
        stem_width=_channels(32, scales[0]),
        stages=tuple(stages),
        head_width=_channels(1280, scales[0]),
        norm_eps=1e-3 if tensorflow else 1e-5,
    )
    return padded(config, tensorflow=tensorflow)


TOWERS = {
    f"{prefix}efficientnet_{size}": _tower(scales, tensorflow=bool(prefix))
    for size, scales in _SCALES.items()
    for prefix in ("", "tf_")
}


def vision_config(
    name: str, image_size: int, pool: str, proj: str | None, shapes: Shapes
) -> EfficientNetConfig:
    """Tower `name`, with the sizes that the `shapes` of its tensors have."""
    tower = TOWERS[name.partition(".")[0]]
    stages = []
    for number, stage in enumerate(tower.stages):
        theirs, last = f"{TRUNK}.blocks.{number}", "conv_pwl" if number else "conv_pw"
        depth = count_layers(shapes, f"{theirs}.{{}}.conv_dw.weight")
        width = shapes[f"{theirs}.0.{last}.weight"][0]
        stages.append(dataclasses.replace(stage, depth=depth, width=width))
    tower = dataclasses.replace(
        tower,
        image_size=image_size,
        stem_width=shapes[f"{TRUNK}.conv_stem.weight"][0],
        stages=tuple(stages),
        head_width=shapes[f"{TRUNK}.conv_head.weight"][0],
        pool=timm_heads.pool_of(pool),
        projection=timm_heads.projection_of(proj, shapes, pool),
    )
    return padded(tower, tensorflow=name.startswith("tf_"))


def options(c: EfficientNetConfig) -> dict[str, Any]:
    """Fields of a `vision_cfg` that make this tower."""
    tensorflow = c.norm_eps == 1e-3
    towers = {
        name: padded(dataclasses.replace(tower, image_size=c.image_size), tensorflow=tensorflow)
        for name, tower in TOWERS.items()
        if name.startswith("tf_") == tensorflow
    }
    name = tower_name(c, towers, free=["pool", "projection"])
    return {"timm_model_name": name, **timm_heads.options(c.pool, c.projection)}


def rules(c: EfficientNetConfig, shapes: Shapes) -> list[Rule]:
    """Rules of a tower."""
    table = [
        *conv(f"{TRUNK}.conv_stem", "vision.stem", bias=False),
        *batch_norm(f"{TRUNK}.bn1", "vision.stem_norm"),
    ]
    for number, stage in enumerate(c.stages):
        theirs, ours = f"{TRUNK}.blocks.{number}", f"vision.stages.{number}"
        table += _block(f"{theirs}.0", f"{ours}.first", stage)
        if stage.depth > 1:
            rest = _block(f"{theirs}.{{}}", f"{ours}.blocks", stage)
            table += [Rule(rule.theirs, rule.ours, rule.transform, first=1) for rule in rest]
    table += point(f"{TRUNK}.conv_head", "vision.head", bias=False)
    table += batch_norm(f"{TRUNK}.bn2", "vision.head_norm")
    table += timm_heads.pool_rules(c.pool)
    return table + timm_heads.projection_rules(c.projection, f"{TRUNK}.classifier", shapes)


def _block(theirs: str, ours: str, stage: EfficientNetStage) -> list[Rule]:
    expands = stage.expand > 1
    norms = [f"{theirs}.bn{number}" for number in range(1, 4)]
    table = []
    if expands:
        table += point(f"{theirs}.conv_pw", f"{ours}.expand", bias=False)
        table += batch_norm(norms.pop(0), f"{ours}.expand_norm")
    return [
        *table,
        *conv(f"{theirs}.conv_dw", f"{ours}.conv", bias=False),
        *batch_norm(norms[0], f"{ours}.conv_norm"),
        *point(f"{theirs}.se.conv_reduce", f"{ours}.squeeze.down"),
        *point(f"{theirs}.se.conv_expand", f"{ours}.squeeze.up"),
        *point(f"{theirs}.{'conv_pwl' if expands else 'conv_pw'}", f"{ours}.project", bias=False),
        *batch_norm(norms[1], f"{ours}.project_norm"),
    ]
