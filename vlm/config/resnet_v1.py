"""Config of the ResNets of image classification, a vision tower."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlm.config.base import VisionTower
from vlm.config.bounds import check_grid_pool
from vlm.errors import ConfigError


@dataclass(frozen=True)
class ResNetV1Config(VisionTower):
    """ResNet as in torchvision and timm (He et al., 2015, arXiv:1512.03385), with a stride of 3x3.

    OpenAI's ResNets are `vlm.ResNetConfig`.

    Args:
        image_size: Side of the square image, in pixels.
        depths: Number of blocks in each stage.
        stem_width: Channels of the stem and of the first stage's blocks; each stage doubles them.
        bottleneck: Use blocks of 1x1, 3x3 and 1x1 convolutions with four times as many output
            channels (ResNet-50), in place of two 3x3 convolutions (ResNet-18).
        pool: Pooling of the positions. mean; attention: from their mean, with learned positions, as
            in OpenAI's ResNets; rotary_attention: the same with rotary positions.
        norm_eps: Epsilon of the batch norms.
        projection: Layer from the pooled channels to the shared space.

    Example:
        >>> from vlm.config import ResNetV1Config
        >>> ResNetV1Config().width
        2048
    """

    kind: ClassVar[str] = "resnet_v1"

    image_size: int = 224
    depths: tuple[int, ...] = (3, 4, 6, 3)
    stem_width: int = 64
    bottleneck: bool = True
    pool: Literal["mean", "attention", "rotary_attention"] = "mean"
    norm_eps: float = 1e-5
    projection: Literal["none", "linear", "linear_bias", "mlp_bias"] = "linear"

    def check(self):
        if not self.depths:
            raise ConfigError("ResNetV1Config.depths is empty: give one for each stage")
        check_grid_pool(self)
        super().check()

    @property
    def patch_size(self) -> int:
        return 4 * 2 ** (len(self.depths) - 1)

    @property
    def width(self) -> int:
        """Channels of the last stage."""
        return self.stem_width * 2 ** (len(self.depths) - 1) * (4 if self.bottleneck else 1)

    @property
    def one_size(self) -> str | None:
        return "tower with attention pooling" if self.pool == "attention" else None

    def sides(self, image_size: int | None = None) -> list[int]:
        """Numbers of positions along a side after the stem and in each stage."""
        sides = [-(-(image_size or self.image_size) // 2)]
        for _ in self.depths:
            sides.append(-(-sides[-1] // 2))  # the max pooling halves, then each later stage
        return sides

    def tokens(self, image_size: int | None = None, *, training: bool = False) -> int:
        """Number of positions of the last stage."""
        return self.sides(image_size)[-1] ** 2
