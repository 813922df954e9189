"""Towers by config class."""

import dataclasses
from typing import Any

from flax import nnx

from vlm.config import (
    ConvNeXtConfig,
    EfficientNetConfig,
    EncoderTextConfig,
    FastViTConfig,
    GroupViTConfig,
    NoTextConfig,
    NoVisionConfig,
    ResNetConfig,
    ResNetV1Config,
    SwinConfig,
    TextConfig,
    TextModuleConfig,
    TextTowerConfig,
    VideoPrismConfig,
    VisionModuleConfig,
    VisionTowerConfig,
    ViTaminConfig,
    ViTConfig,
    XCLIPConfig,
)
from vlm.models import (
    convnext,
    efficientnet,
    encoders,
    fastvit,
    groupvit,
    resnet,
    resnet_v1,
    swin,
    text,
    videoprism,
    vit,
    vitamin,
    xclip,
)
from vlm.models.modules import module_flops, module_tower
from vlm.nn.transformer import Execution

# Each module has a tower class and a function for its forward FLOPs.
_KINDS = {
    ViTConfig: (vit.ViTTower, vit.flops),
    ResNetConfig: (resnet.ResNetTower, resnet.flops),
    ConvNeXtConfig: (convnext.ConvNeXtTower, convnext.flops),
    ViTaminConfig: (vitamin.ViTaminTower, vitamin.flops),
    FastViTConfig: (fastvit.FastViTTower, fastvit.flops),
    GroupViTConfig: (groupvit.GroupViTTower, groupvit.flops),
    EfficientNetConfig: (efficientnet.EfficientNetTower, efficientnet.flops),
    VideoPrismConfig: (videoprism.VideoPrismTower, videoprism.flops),
    XCLIPConfig: (xclip.XCLIPTower, xclip.flops),
    SwinConfig: (swin.SwinTower, swin.flops),
    ResNetV1Config: (resnet_v1.ResNetV1Tower, resnet_v1.flops),
}


def vision_tower(
    config: VisionTowerConfig, embed_dim: int, *, execution: Execution, rngs: nnx.Rngs
) -> Any:
    """Make the tower of `config`: normalised images (b, h, w, 3) to embeddings (b, embed_dim).

    It is None for a `NoVisionConfig`.

    Example:
        >>> from flax import nnx
        >>> options = {"execution": vlm.nn.Execution(), "rngs": nnx.Rngs(0)}
        >>> tower = vlm.models.vision_tower(experiment.model.vision, 16, **options)
        >>> type(tower).__name__
        'ViTTower'
    """
    if isinstance(config, NoVisionConfig):
        return None
    if isinstance(config, VisionModuleConfig):
        return module_tower(config, embed_dim, execution=execution, rngs=rngs)
    tower, _ = _KINDS[type(config)]
    return tower(config, embed_dim, execution=execution, rngs=rngs)


def vision_flops(
    config: VisionTowerConfig, embed_dim: int, *, training: bool = False
) -> dict[str, float]:
    """Forward FLOPs of one image, by part: such as stem, projections, scores, mlp, projection.

    With `training`, patch dropout is taken into account.
    """
    if isinstance(config, NoVisionConfig):
        return {}
    if isinstance(config, VisionModuleConfig):
        return module_flops(config, embed_dim)
    _, flops = _KINDS[type(config)]
    return flops(config, embed_dim, training=training)


def text_tower(
    config: TextTowerConfig, embed_dim: int, *, execution: Execution, rngs: nnx.Rngs
) -> Any:
    """Make the tower of `config`: token ids (b, n) to embeddings (b, embed_dim); or None."""
    if isinstance(config, NoTextConfig):
        return None
    kinds: dict[Any, Any] = {
        TextModuleConfig: module_tower,
        EncoderTextConfig: encoders.EncoderTower,
        TextConfig: text.TextTower,
    }
    make = kinds[type(config)]
    return make(config, embed_dim, execution=execution, rngs=rngs)


def text_flops(
    config: TextTowerConfig, embed_dim: int, *, masking: float = 0.0
) -> dict[str, float]:
    """Forward FLOPs of one text, by part; `masking` is the fraction of dropped tokens."""
    if isinstance(config, TextConfig):
        return text.text_flops(config, embed_dim, masking=masking)
    if isinstance(config, EncoderTextConfig):
        return encoders.flops(config, embed_dim, masking=masking)
    if isinstance(config, NoTextConfig):
        return {}
    kept = config.tokens(masking=masking)
    return module_flops(dataclasses.replace(config, context_length=kept), embed_dim)
