"""timm's vision towers inside open_clip folders, one module per family.

A module has the patterns of its `NAMES`, each with the pairs of timm_pool and timm_proj that it
reads; `READS`, the same in words; `vision_config`, which reads sizes off the shapes of tensors;
`options`, which has the fields of a `vision_cfg` for a tower (fastvit has none, since
it is not written); `rules`.
"""

from typing import Any

from vlm.config import (
    ConvNeXtConfig,
    EfficientNetConfig,
    FastViTConfig,
    ResNetV1Config,
    SwinConfig,
    VisionTowerConfig,
    ViTaminConfig,
    ViTConfig,
)
from vlm.errors import CheckpointError, brief
from vlm.weights import (
    convnext,
    efficientnet,
    eva,
    fastvit,
    mobileclip,
    naflexvit,
    resnet_v1,
    swin,
    timm,
    vitamin,
)
from vlm.weights.rules import Shapes

FAMILIES = (
    fastvit, convnext, eva, vitamin, mobileclip, naflexvit, swin, resnet_v1, efficientnet, timm
)  # fmt: skip
# Those whose rules depend on the shapes of the tensors too.
BY_SHAPES = (timm, convnext, swin, resnet_v1, efficientnet)


def vision_config(
    name: str, image_size: int, pool: str, proj: str | None, shapes: Shapes, where: str
) -> VisionTowerConfig:
    """Configuration of timm's tower `name`, with the sizes that the `shapes` of its tensors have.

    Raises:
        CheckpointError: an unknown tower, another pool or projection, or other weights.
    """
    family = find_family(name, pool, proj, where)
    try:
        return family.vision_config(name, image_size, pool, proj, shapes)
    except (KeyError, ValueError, IndexError):
        raise CheckpointError(f"{where}: the weights are not those of timm's {name}") from None


def find_family(name: str, pool: str, proj: str | None, where: str) -> Any:
    """Module of the family that reads timm's tower `name` with this pool and projection.

    Raises:
        CheckpointError: an unknown tower, or another pool or projection.
    """
    matches = (
        (family, pairs)
        for family in FAMILIES
        for pattern, pairs in family.NAMES.items()
        if pattern.match(name)
    )
    family, pairs = next(matches, (None, ()))
    if family is None:
        raise CheckpointError(
            f"{where}: the vision tower {brief(name)} is not one that vlm reads: of timm's it "
            f"reads {'; '.join(family.READS for family in FAMILIES)}"
        )
    if (pool, proj or None) not in pairs:
        raise CheckpointError(
            f"{where}: the vision tower {name!r} has timm_pool {pool!r} and timm_proj {proj!r}: "
            f"vlm reads {family.READS}"
        )
    return family


def family_of(config: VisionTowerConfig, shapes: Shapes) -> Any | None:
    """Module of the family with this tower; None for open_clip's own towers.

    Those equal some of timm's: the `shapes` of the tensors decide, if there are any.
    """
    match config:
        case FastViTConfig():
            return fastvit
        case ConvNeXtConfig():
            return convnext
        case ViTaminConfig():
            return vitamin
        case SwinConfig():
            return swin
        case ResNetV1Config():
            return resnet_v1
        case EfficientNetConfig():
            return efficientnet
        case ViTConfig(max_patches=int()):
            return naflexvit
        case ViTConfig(key_bias=False):
            return eva
        case ViTConfig(stem="nested"):
            return mobileclip
        case ViTConfig(pool="map") | ViTConfig(projection="linear_bias" | "mlp_bias"):
            return timm
        case ViTConfig(pool="class", patch_bias=True):
            return timm
        case ViTConfig() if any(name.startswith(timm.TRUNK) for name in shapes):
            return timm
    return None
