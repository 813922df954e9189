"""Config of EfficientNet, a vision tower."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from vlm.config.base import Config, VisionTower
from vlm.config.bounds import check_grid_pool
from vlm.errors import ConfigError


@dataclass(frozen=True)
class EfficientNetStage(Config):
    """A stage of EfficientNet: `depth` blocks of one width, all but the first with a skip.

    Args:
        depth: Number of blocks.
        width: Output channels of each block.
        expand: Expansion factor of the hidden channels. 1: no expansion layer.
        kernel: Side of the depthwise convolutions, an odd number of pixels.
        halve: Use stride 2 in the first depthwise convolution.
        symmetric: For `halve`: pad all sides equally. Otherwise pad one row and column less before
            the image than after it, as TensorFlow does for even sides.

    Example:
        >>> from vlm.config import EfficientNetStage
        >>> EfficientNetStage(depth=2, width=24, expand=6, halve=True).kernel
        3
    """

    depth: int
    width: int
    expand: int = 6
    kernel: int = 3
    halve: bool = False
    symmetric: bool = False

    def check(self):
        if self.kernel % 2 == 0:
            raise ConfigError(
                f"EfficientNetStage.kernel {self.kernel} has no middle: choose an odd number"
            )


# The stages of B0; those of B7 are twice as wide and 3.1 times as deep.
_STAGES = (
    EfficientNetStage(1, 16, expand=1),
    EfficientNetStage(2, 24, halve=True),
    EfficientNetStage(2, 40, kernel=5, halve=True),
    EfficientNetStage(3, 80, halve=True),
    EfficientNetStage(3, 112, kernel=5),
    EfficientNetStage(4, 192, kernel=5, halve=True),
    EfficientNetStage(1, 320),
)


@dataclass(frozen=True)
class EfficientNetConfig(VisionTower):
    """EfficientNet without its classifier (Tan and Le, 2019, arXiv:1905.11946), as in ALIGN.

    Args:
        image_size: Side of the square image, in pixels.
        stem_width: Channels of the stem, a 3x3 convolution of stride 2.
        stages: The stages in order.
        squeeze: Channels of squeeze-and-excitation, as a fraction of the block's input channels.
        pool: Pooling of the positions: mean or max; attention from their mean, with learned
            positions; or rotary_attention.
        norm_eps: Epsilon of the batch norms.
        projection: Layer from the pooled channels to the shared space.
        head_width: Channels of a 1x1 convolution after the stages. 0: none, as in ALIGN.
        symmetric: Pad all sides of the stem equally, as timm does. Otherwise pad no row and column
            before the image and one after it, as TensorFlow does for even sides.

    Example:
        >>> from vlm.config import EfficientNetConfig
        >>> EfficientNetConfig().tokens()
        49
    """

    kind: ClassVar[str] = "efficientnet"

    image_size: int = 224
    stem_width: int = 32
    stages: tuple[EfficientNetStage, ...] = _STAGES
    squeeze: float = 0.25
    pool: Literal["mean", "max", "attention", "rotary_attention"] = "mean"
    norm_eps: float = 1e-3
    projection: Literal["none", "linear", "linear_bias", "mlp_bias"] = "linear"
    head_width: int = 0
    symmetric: bool = False

    def check(self):
        if not self.stages:
            raise ConfigError("EfficientNetConfig.stages is empty: give one at least")
        check_grid_pool(self)
        super().check()

    @property
    def patch_size(self) -> int:
        return 2 * 2 ** sum(stage.halve for stage in self.stages)

    @property
    def width(self) -> int:
        """Channels that are pooled: those of the last convolution or stage."""
        return self.head_width or self.stages[-1].width

    @property
    def one_size(self) -> str | None:
        return "tower with attention pooling" if self.pool == "attention" else None

    def sides(self, image_size: int | None = None) -> list[int]:
        """Numbers of positions along a side after the stem and after each stage."""
        sides = [((image_size or self.image_size) + self.symmetric) // 2]
        for stage in self.stages:
            side = sides[-1]
            if stage.halve:
                side = (side + stage.symmetric) // 2
            sides.append(side)
        return sides

    def tensorflow_padded(self) -> "EfficientNetConfig":
        """Return the tower with TensorFlow's SAME padding, which depends on the image size.

        Example:
            >>> from vlm.config import EfficientNetConfig
            >>> EfficientNetConfig(image_size=75).tensorflow_padded().symmetric
            True
        """
        side, stages = (self.image_size + 1) // 2, []
        for stage in self.stages:
            stages.append(replace(stage, symmetric=stage.halve and side % 2 == 1))
            side = (side + 1) // 2 if stage.halve else side
        return replace(self, stages=tuple(stages), symmetric=self.image_size % 2 == 1)

    def tokens(self, image_size: int | None = None, *, training: bool = False) -> int:
        """Number of positions of the last stage."""
        return self.sides(image_size)[-1] ** 2
