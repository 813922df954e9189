"""Config of Swin, a vision tower."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlm.config.base import VisionTower
from vlm.errors import ConfigError


@dataclass(frozen=True)
class SwinConfig(VisionTower):
    """Swin (Liu et al., 2021, arXiv:2103.14030): stages of attention in shifted windows.

    Args:
        image_size: Side of the square image, in pixels.
        depths: Number of blocks in each stage, an even number: the windows of every second block
            are shifted.
        widths: Channels of each stage.
        heads: Number of attention heads in each stage; they divide its channels.
        mlp_dims: Width of the hidden layer of the blocks in each stage.
        window: Side of the windows, in positions.
        norm_eps: Epsilon of the layer norms.
        projection: Layer from the mean of the positions to the shared space.

    Example:
        >>> from vlm.config import SwinConfig
        >>> SwinConfig().tokens()
        49
    """

    kind: ClassVar[str] = "swin"
    attends: ClassVar[bool] = True

    image_size: int = 224
    depths: tuple[int, ...] = (2, 2, 18, 2)
    widths: tuple[int, ...] = (128, 256, 512, 1024)
    heads: tuple[int, ...] = (4, 8, 16, 32)
    mlp_dims: tuple[int, ...] = (512, 1024, 2048, 4096)
    window: int = 7
    norm_eps: float = 1e-5
    projection: Literal["none", "linear", "linear_bias", "mlp_bias"] = "linear"

    def check(self):
        counts = {len(self.depths), len(self.widths), len(self.heads), len(self.mlp_dims)}
        if len(counts) != 1 or not self.depths:
            raise ConfigError(
                f"SwinConfig has depths {self.depths}, widths {self.widths}, heads {self.heads} "
                f"and mlp_dims {self.mlp_dims}: give one of each for every stage"
            )
        for depth, width, heads in zip(self.depths, self.widths, self.heads, strict=True):
            if depth % 2:
                raise ConfigError(
                    f"SwinConfig.depths has {depth}, and every second block shifts its windows: "
                    "choose even numbers"
                )
            if width % heads:
                raise ConfigError(
                    f"SwinConfig: {width} channels are not a multiple of {heads} heads: choose "
                    "heads that divide them"
                )
        super().check()

    @property
    def patch_size(self) -> int:
        return 4 * 2 ** (len(self.depths) - 1)

    @property
    def width(self) -> int:
        """Channels of the last stage."""
        return self.widths[-1]

    @property
    def one_size(self) -> str:
        return "Swin tower"

    def sides(self) -> list[int]:
        """Numbers of positions along a side in each stage."""
        sides = [self.image_size // 4]
        for _ in self.depths[1:]:
            sides.append(-(-sides[-1] // 2))
        return sides

    def tokens(self, image_size: int | None = None, *, training: bool = False) -> int:
        """Number of positions of the last stage; images have one size."""
        return self.sides()[-1] ** 2
