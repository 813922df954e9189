"""timm's vision towers inside open_clip folders, one module for each family of them.

Each has the pattern of its names, `NAME`; what it reads in words, `READS`; `vision_config`, which
reads sizes off the shapes of tensors; `owns`, for the towers that it writes; `options`, their
fields of a `vision_cfg`; and `rules`.
"""

from collections.abc import Mapping
from typing import Any

from vlm.config import VisionTowerConfig
from vlm.errors import CheckpointError
from vlm.weights import convnext, eva, fastvit, mobileclip, timm, vitamin
from vlm.weights.fields import show

FAMILIES = (fastvit, convnext, eva, vitamin, mobileclip, timm)


def vision_config(
    name: str,
    image_size: int,
    pool: str,
    proj: str | None,
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
) -> VisionTowerConfig:
    """The tower that timm calls `name`, with the sizes that the `shapes` of its tensors have.

    Raises:
        CheckpointError: not one of these towers, or one with another pool or projection.
    """
    for family in FAMILIES:
        if family.NAME.match(name):
            return family.vision_config(name, image_size, pool, proj, shapes, where)
    reads = "; ".join(family.READS for family in FAMILIES)
    raise CheckpointError(
        f"{where}: the vision tower {show(name)} is not one that vlm reads: of timm's it reads "
        f"{reads}"
    )


def family_of(config: VisionTowerConfig) -> Any | None:
    """The family's module that writes this tower, or None: open_clip's own towers."""
    return next((family for family in FAMILIES if family.owns(config)), None)
