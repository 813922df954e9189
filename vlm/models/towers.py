"""Table of vision towers by config class."""

from flax import nnx

from vlm.config import (
    ConvNeXtConfig,
    EfficientNetConfig,
    FastViTConfig,
    ResNetConfig,
    VisionTowerConfig,
    ViTaminConfig,
    ViTConfig,
)
from vlm.models import convnext, efficientnet, fastvit, resnet, vit, vitamin
from vlm.nn.transformer import Execution

# Each module has a tower class and a function for its forward FLOPs.
_KINDS = {
    ViTConfig: (vit.ViTTower, vit.flops),
    ResNetConfig: (resnet.ResNetTower, resnet.flops),
    ConvNeXtConfig: (convnext.ConvNeXtTower, convnext.flops),
    ViTaminConfig: (vitamin.ViTaminTower, vitamin.flops),
    FastViTConfig: (fastvit.FastViTTower, fastvit.flops),
    EfficientNetConfig: (efficientnet.EfficientNetTower, efficientnet.flops),
}


def vision_tower(
    config: VisionTowerConfig, embed_dim: int, *, execution: Execution, rngs: nnx.Rngs
) -> nnx.Module:
    """Make the tower of `config`: normalised images (b, h, w, 3) to embeddings (b, embed_dim).

    Example:
        >>> from flax import nnx
        >>> options = {"execution": vlm.nn.Execution(), "rngs": nnx.Rngs(0)}
        >>> tower = vlm.models.vision_tower(experiment.model.vision, 16, **options)
        >>> type(tower).__name__
        'ViTTower'
    """
    tower, _ = _KINDS[type(config)]
    return tower(config, embed_dim, execution=execution, rngs=rngs)


def vision_flops(
    config: VisionTowerConfig, embed_dim: int, *, training: bool = False
) -> dict[str, float]:
    """Forward FLOPs of one image, by part: such as stem, projections, scores, mlp, projection.

    With `training`, patch dropout is taken into account.
    """
    _, flops = _KINDS[type(config)]
    return flops(config, embed_dim, training=training)
