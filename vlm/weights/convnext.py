"""The ConvNeXt vision towers of open_clip folders, which are timm's."""

import re
from collections.abc import Mapping

from vlm.config import ConvNeXtConfig, VisionTowerConfig
from vlm.errors import CheckpointError
from vlm.weights.fields import first_group
from vlm.weights.layers import conv, linear, norm
from vlm.weights.rules import Rule

NAME = re.compile(r"convnext_(tiny|small|base|large|xlarge|xxlarge)(\..*)?$")
READS = "convnext_{tiny,small,base,large,xlarge,xxlarge} with the mean"
_TRUNK = "visual.trunk"
_STAGE = re.compile(r"visual\.trunk\.stages\.(\d+)\.blocks\.(\d+)\.norm\.weight")

# What timm's names stand for: blocks, and channels. The MLPs are four times as wide.
_SIZES = {
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
    "xxlarge": ((3, 4, 30, 3), (384, 768, 1536, 3072)),
}


def _norm_eps(size: str) -> float:
    return 1e-5 if size == "xxlarge" else 1e-6


def vision_config(
    name: str,
    image_size: int,
    pool: str,
    proj: str | None,
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
) -> ConvNeXtConfig:
    """The tower `name`, with the sizes that the `shapes` of its tensors have.

    Raises:
        CheckpointError: another pool or projection, or the weights of something else.
    """
    if pool not in ("", "avg") or proj not in ("none", "linear", "mlp"):
        raise CheckpointError(
            f"{where}: the vision tower {name!r} has timm_pool {pool!r} and timm_proj {proj!r}: "
            "vlm reads it with timm's own pool and the projections none, linear and mlp"
        )
    found = [match for match in map(_STAGE.fullmatch, shapes) if match]
    count = 1 + max((int(match[1]) for match in found), default=-1)
    first = [f"{_TRUNK}.stages.{stage}.blocks.0.mlp.fc1.weight" for stage in range(count)]
    if not first or any(len(shapes.get(name, ())) != 2 for name in first):
        raise CheckpointError(f"{where}: the weights are not those of timm's {name}")
    return ConvNeXtConfig(
        image_size=image_size,
        depths=tuple(sum(int(match[1]) == stage for match in found) for stage in range(count)),
        widths=tuple(shapes[name][1] for name in first),
        mlp_dims=tuple(shapes[name][0] for name in first),
        norm_eps=_norm_eps(first_group(NAME, name)),
        projection=proj,
    )


def owns(config: VisionTowerConfig) -> bool:
    """Whether a tower is one of these."""
    return isinstance(config, ConvNeXtConfig)


def options(c: ConvNeXtConfig) -> dict[str, str | None]:
    """The fields of a `vision_cfg` that make this tower of timm's.

    Raises:
        CheckpointError: timm has no name for it.
    """
    for size, (depths, widths) in _SIZES.items():
        mlp_dims = tuple(4 * width for width in widths)
        if (c.depths, c.widths, c.mlp_dims, c.norm_eps) == (
            depths,
            widths,
            mlp_dims,
            _norm_eps(size),
        ):
            name = f"convnext_{size}"
            return {"timm_model_name": name, "timm_pool": "", "timm_proj": c.projection}
    raise CheckpointError(
        f"timm has no ConvNeXt of depths {c.depths}, widths {c.widths}, mlp_dims {c.mlp_dims} and "
        f"norm_eps {c.norm_eps}: save the model as a vlm bundle instead"
    )


def rules(c: ConvNeXtConfig) -> list[Rule]:
    """The table of a tower."""
    table = [
        *conv(f"{_TRUNK}.stem.0", "vision.stem"),
        *norm(f"{_TRUNK}.stem.1", "vision.stem_norm"),
    ]
    for number in range(len(c.depths)):
        theirs, ours = f"{_TRUNK}.stages.{number}", f"vision.stages.{number}"
        if number:
            table += norm(f"{theirs}.downsample.0", f"{ours}.halve_norm")
            table += conv(f"{theirs}.downsample.1", f"{ours}.halve")
        block = f"{theirs}.blocks.{{}}"
        table += conv(f"{block}.conv_dw", f"{ours}.blocks.conv")
        table += norm(f"{block}.norm", f"{ours}.blocks.norm")
        table += linear(f"{block}.mlp.fc1", f"{ours}.blocks.mlp.up")
        table += linear(f"{block}.mlp.fc2", f"{ours}.blocks.mlp.down")
        table.append(Rule(f"{block}.gamma", f"{ours}.blocks.scale"))
    table += norm(f"{_TRUNK}.head.norm", "vision.norm")
    if c.projection == "linear":
        table += linear("visual.head.proj", "vision.projection", bias=False)
    elif c.projection == "mlp":
        table += linear("visual.head.mlp.fc1", "vision.hidden")
        table += linear("visual.head.mlp.fc2", "vision.projection", bias=False)
    return table
