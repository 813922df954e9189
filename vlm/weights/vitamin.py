"""The ViTamin vision towers of open_clip folders, which are timm's."""

import re
from collections.abc import Mapping

from vlm.config import VisionTowerConfig, ViTaminConfig
from vlm.errors import CheckpointError
from vlm.weights.fields import first_group
from vlm.weights.layers import conv, linear, norm, point
from vlm.weights.rules import Rule, leading
from vlm.weights.timm import attention_rules, block_count

NAME = re.compile(r"vitamin_(small|base|large|large2|xlarge)_(\d+)(\..*)?$")
READS = "vitamin_* with the mean and a linear projection"
_TRUNK, _STEM = "visual.trunk", "visual.trunk.patch_embed.backbone"

# What timm's names stand for: channels of the stem and of the two stages, then width, depth and
# heads of the blocks, whose MLPs are twice as wide. The stages have two and four blocks.
_SIZES = {
    "small": (64, (64, 128), 384, 14, 6),
    "base": (128, (128, 256), 768, 14, 12),
    "large": (160, (160, 320), 1024, 31, 16),
    "large2": (160, (160, 320), 1024, 31, 16),
    "xlarge": (192, (192, 384), 1152, 32, 16),
}
_DEPTHS = (2, 4)
# Images that timm has names for.
_PIXELS = {
    "small": (224,), "base": (224,), "large": (224, 256, 336, 384), "xlarge": (256, 336, 384)
}  # fmt: skip


def vision_config(
    name: str,
    image_size: int,
    pool: str,
    proj: str | None,
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
) -> ViTaminConfig:
    """The tower `name`, with the sizes that the `shapes` of its tensors have.

    Raises:
        CheckpointError: another pool or projection, or the weights of something else.
    """
    if pool not in ("", "avg") or proj not in ("none", "linear"):
        raise CheckpointError(
            f"{where}: the vision tower {name!r} has timm_pool {pool!r} and timm_proj {proj!r}: "
            "vlm reads it with the mean of the image and the projections none and linear"
        )
    norms = re.compile(rf"{re.escape(_STEM)}\.stages\.([01])\.\d+\.pre_norm\.weight")
    found = [match[1] for match in map(norms.fullmatch, shapes) if match]
    try:
        return ViTaminConfig(
            image_size=image_size,
            stem_width=shapes[f"{_STEM}.stem.conv1.weight"][0],
            conv_widths=(
                shapes[f"{_STEM}.stages.0.0.conv3_1x1.weight"][0],
                shapes[f"{_STEM}.stages.1.0.conv3_1x1.weight"][0],
            ),
            conv_depths=(found.count("0"), found.count("1")),
            width=shapes[f"{_STEM}.pool.proj.weight"][0],
            depth=block_count(shapes),
            heads=_SIZES[first_group(NAME, name)][-1],
            mlp_dim=shapes[f"{_TRUNK}.blocks.0.mlp.w0.weight"][0],
            position=f"{_TRUNK}.pos_embed" in shapes,
            projection=proj,
        )
    except (KeyError, IndexError):
        raise CheckpointError(f"{where}: the weights are not those of timm's {name}") from None


def owns(config: VisionTowerConfig) -> bool:
    """Whether a tower is one of these."""
    return isinstance(config, ViTaminConfig)


def options(c: ViTaminConfig) -> dict[str, str | None]:
    """The fields of a `vision_cfg` that make this tower of timm's.

    Raises:
        CheckpointError: timm has no name for it.
    """
    ours = c.stem_width, c.conv_widths, c.width, c.depth, c.heads
    for size, pixels in _PIXELS.items():
        same = ours == _SIZES[size] and c.conv_depths == _DEPTHS and c.mlp_dim == 2 * c.width
        same = same and c.position == (size != "xlarge")
        if same and c.image_size in pixels and c.norm_eps == 1e-6:
            name = f"vitamin_{size}_{c.image_size}"
            return {"timm_model_name": name, "timm_pool": "", "timm_proj": c.projection}
    raise CheckpointError(
        f"timm has no ViTamin of width {c.width}, depth {c.depth} and image_size {c.image_size} "
        "with these convolutions: save the model as a vlm bundle instead"
    )


def rules(c: ViTaminConfig) -> list[Rule]:
    """The table of a tower."""
    table = [
        *conv(f"{_STEM}.stem.conv1", "vision.stem.conv1"),
        *norm(f"{_STEM}.stem.norm1", "vision.stem.norm1"),
        *conv(f"{_STEM}.stem.conv2", "vision.stem.conv2"),
    ]
    inputs = c.stem_width
    for stage, (width, depth) in enumerate(zip(c.conv_widths, c.conv_depths, strict=True)):
        for number in range(depth):
            theirs, ours = (
                f"{_STEM}.stages.{stage}.{number}",
                f"vision.stem.stages.{stage}.{number}",
            )
            if width != inputs:
                table += point(f"{theirs}.shortcut.expand", f"{ours}.shortcut")
            table += norm(f"{theirs}.pre_norm", f"{ours}.norm")
            table += point(f"{theirs}.conv1_1x1", f"{ours}.widen")
            table += conv(f"{theirs}.conv2_kxk", f"{ours}.conv")
            table += point(f"{theirs}.conv3_1x1", f"{ours}.narrow")
            inputs = width
    block, ours = f"{_TRUNK}.blocks.{{}}", "vision.transformer.blocks"
    return [
        *table,
        *norm(f"{_STEM}.pool.norm", "vision.stem.last_norm"),
        *conv(f"{_STEM}.pool.proj", "vision.stem.last"),
        *([Rule(f"{_TRUNK}.pos_embed", "vision.position", leading(1))] if c.position else []),
        *attention_rules(),
        *norm(f"{block}.mlp.norm", f"{ours}.mlp.norm"),
        *linear(f"{block}.mlp.w0", f"{ours}.mlp.gate"),
        *linear(f"{block}.mlp.w1", f"{ours}.mlp.up"),
        *linear(f"{block}.mlp.w2", f"{ours}.mlp.down"),
        *norm(f"{_TRUNK}.fc_norm", "vision.norm"),
        *(
            linear("visual.head.proj", "vision.projection", bias=False)
            if c.projection == "linear"
            else []
        ),
    ]
