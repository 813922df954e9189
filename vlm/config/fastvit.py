"""Config of FastViT, a vision tower."""

from dataclasses import dataclass
from typing import ClassVar

from vlm.config.base import Config, VisionTower
from vlm.errors import ConfigError


@dataclass(frozen=True)
class FastViTStage(Config):
    """A stage of FastViT: `depth` blocks of one width, each a token mixer and an MLP.

    Args:
        depth: Number of blocks.
        width: Channels of the stage.
        mlp_dim: Width of the hidden layer of a block's MLP.
        heads: Number of attention heads of the token mixer. 0: a 3x3 convolution in place of
            attention.
        norm: Normalise before the attention.
        halve: Start with a 7x7 convolution of stride 2.
        squeeze: Hidden channels of that convolution's squeeze-and-excitation. 0: it has none.
        position: Encode positions by a 7x7 convolution (arXiv:2102.10882).

    Example:
        >>> from vlm.config import FastViTStage
        >>> FastViTStage(depth=2, width=64, mlp_dim=192).halve
        True
    """

    depth: int
    width: int
    mlp_dim: int
    heads: int = 0
    norm: bool = False
    halve: bool = True
    squeeze: int = 0
    position: bool = False


@dataclass(frozen=True)
class FastViTConfig(VisionTower):
    """FastViT after reparameterisation, as in MobileCLIP (Vasu et al., 2023, arXiv:2303.14189).

    Args:
        stem_width: Channels of the stem.
        stages: The stages in order.
        width: Channels of the last convolution, which is mean-pooled and projected.
        squeeze: Hidden channels of squeeze-and-excitation after the last convolution.
        image_size: Side of the square image, in pixels.
        norm_eps: Epsilon of the layer norms.

    Example:
        >>> from vlm.config import FastViTStage
        >>> stages = FastViTStage(2, 64, 192, halve=False), FastViTStage(2, 128, 384)
        >>> vlm.FastViTConfig(stem_width=64, stages=stages, width=256, squeeze=16).patch_size
        8
    """

    kind: ClassVar[str] = "fastvit"

    stem_width: int
    stages: tuple[FastViTStage, ...]
    width: int
    squeeze: int
    image_size: int = 256
    norm_eps: float = 1e-5

    def check(self):
        inputs = self.stem_width
        for number, stage in enumerate(self.stages):
            where = f"FastViTStage {number}"
            if stage.heads and stage.width % stage.heads:
                raise ConfigError(
                    f"{where}: width {stage.width} is not a multiple of heads {stage.heads}"
                )
            if stage.width % inputs or not (stage.halve or stage.width == inputs):
                raise ConfigError(
                    f"{where}: width {stage.width} after {inputs}: a stage that halves takes a "
                    "multiple of the width before it, and another the same width"
                )
            inputs = stage.width
        if self.width % inputs:
            raise ConfigError(
                f"FastViTConfig.width {self.width} is not a multiple of the last stage's {inputs}"
            )
        super().check()

    @property
    def patch_size(self) -> int:
        return 4 * 2 ** sum(stage.halve for stage in self.stages)

    def tokens(self, image_size: int | None = None, *, training: bool = False) -> int:
        """Number of positions of the last convolution."""
        return (-(-(image_size or self.image_size) // self.patch_size)) ** 2
