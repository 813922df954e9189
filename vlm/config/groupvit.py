"""Config of GroupViT, a vision tower."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlm.config.base import VisionTower
from vlm.config.bounds import check_heads
from vlm.errors import ConfigError


@dataclass(frozen=True)
class GroupViTConfig(VisionTower):
    """GroupViT (Xu et al., 2022, arXiv:2202.11094): stages that group patches into segments.

    Args:
        image_size: Side of the square image, in pixels.
        patch_size: Side of a patch, in pixels.
        width: Width of the tokens.
        depths: Number of blocks of each stage.
        groups: Number of learned group tokens of each stage, and of the segments that it makes.
            0, at the end: the stage makes none.
        heads: Number of attention heads; they divide the width.
        mlp_dim: Width of the hidden layer of a block's MLP.
        group_mlp_dim: Width of the hidden layer that mixes the group tokens.
        segment_mlp_dim: Width of the hidden layer of the MLP over new segments.
        assign_eps: Added to the number of patches of a segment, which divides their sum.
        activation: Activation of the MLPs.
        norm_eps: Epsilon of the layer norms.
        projection: Layer from the mean of the segments to the shared space. mlp_relu: two layers
            with biases and a ReLU.
        projection_dim: For projection mlp_relu: width of its hidden layer.

    Example:
        >>> from vlm.config import GroupViTConfig
        >>> GroupViTConfig().tokens()  # 196 patches and 64 group tokens
        260
    """

    kind: ClassVar[str] = "groupvit"
    attends: ClassVar[bool] = False  # of one map for an image; that of a segment is no heat map

    image_size: int = 224
    patch_size: int = 16
    width: int = 384
    depths: tuple[int, ...] = (6, 3, 3)
    groups: tuple[int, ...] = (64, 8, 0)
    heads: int = 6
    mlp_dim: int = 1536
    group_mlp_dim: int = 192
    segment_mlp_dim: int = 1536
    assign_eps: float = 1.0
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "relu"] = "gelu"
    norm_eps: float = 1e-5
    projection: Literal["none", "linear", "mlp_relu"] = "mlp_relu"
    projection_dim: int = 4096

    def check(self):
        check_heads(self)
        super().check()
        if len(self.groups) != len(self.depths) or not self.groups:
            raise ConfigError(
                f"GroupViTConfig.groups {self.groups} has another length than depths {self.depths}:"
                " give one for each stage"
            )
        if 0 in self.groups[:-1]:
            raise ConfigError(
                f"GroupViTConfig.groups {self.groups}: only the last stage may have 0 groups"
            )

    @property
    def one_size(self) -> str:
        return "GroupViT tower"

    def tokens(self, image_size: int | None = None, *, training: bool = False) -> int:
        """Number of tokens of the first stage, the largest: patches and group tokens."""
        return ((image_size or self.image_size) // self.patch_size) ** 2 + self.groups[0]
