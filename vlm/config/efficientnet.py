"""EfficientNet's config, a vision tower as those of `vlm.config.towers` are."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlm.config.base import Config
from vlm.config.bounds import check_image_size, check_projection
from vlm.errors import ConfigError


@dataclass(frozen=True)
class EfficientNetStage(Config):
    """A stage of EfficientNet: `depth` blocks of one width, all but the first with a skip.

    Args:
        depth: Number of blocks.
        width: Channels that each block gives.
        expand: How many times as many channels as its input a block has inside. 1: a block
            begins with its depthwise convolution.
        kernel: Side of the depthwise convolutions, an odd number of pixels.
        halve: Give the first block's depthwise convolution a stride of 2.
        symmetric: Of `halve`: pad alike on all sides. Otherwise one row and one column less
            before the image than after it, as TensorFlow pads an image of even sides.

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


# B0's, which B7 makes twice as wide and 3.1 times as deep.
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
class EfficientNetConfig(Config):
    """EfficientNet without its classifier (Tan and Le, 2019, arXiv:1905.11946), as in ALIGN.

    Args:
        image_size: Side of the square image, in pixels.
        stem_width: Channels of the stem, a 3x3 convolution of stride 2.
        stages: The stages, one after another.
        squeeze: Share of a block's input channels that its squeeze-and-excitation has.
        pool: What stands for the image: the mean, or the largest value, of each channel.
        norm_eps: Epsilon of the batch norms.
        projection: Layer from the pooled channels to the shared space.

    Example:
        >>> from vlm.config import EfficientNetConfig
        >>> EfficientNetConfig().tokens()
        49
    """

    kind: ClassVar[str] = "efficientnet"
    attends: ClassVar[bool] = False

    image_size: int = 224
    stem_width: int = 32
    stages: tuple[EfficientNetStage, ...] = _STAGES
    squeeze: float = 0.25
    pool: Literal["mean", "max"] = "mean"
    norm_eps: float = 1e-3
    projection: Literal["none", "linear"] = "linear"

    def check(self):
        if not self.stages:
            raise ConfigError("EfficientNetConfig.stages is empty: give one at least")
        check_image_size(self)

    @property
    def patch_size(self) -> int:
        return 2 * 2 ** sum(stage.halve for stage in self.stages)

    @property
    def width(self) -> int:
        """Channels of the last stage, which are pooled."""
        return self.stages[-1].width

    @property
    def one_size(self) -> None:
        return None

    def sides(self, image_size: int | None = None) -> list[int]:
        """Places along a side that the stem and each stage leave of an image."""
        sides = [(image_size or self.image_size) // 2]
        for stage in self.stages:
            side = sides[-1]
            if stage.halve:
                side = (side + stage.symmetric) // 2
            sides.append(side)
        return sides

    def tokens(self, image_size: int | None = None, *, training: bool = False) -> int:
        """Places of the last stage, which are pooled."""
        return self.sides(image_size)[-1] ** 2

    def check_space(self, embed_dim: int) -> None:
        """Refuse a space that the tower cannot embed into."""
        check_projection(self, embed_dim)
