"""Configs of the vision towers that take videos."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlm.config.base import VisionTower
from vlm.config.bounds import check_heads
from vlm.errors import ConfigError


class _VideoTower(VisionTower):
    """A tower of videos with a fixed number of frames, and images of one size."""

    frames: int

    @property
    def video_frames(self) -> int:
        return self.frames

    @property
    def one_size(self) -> str:
        return "tower of videos"


@dataclass(frozen=True)
class VideoPrismConfig(_VideoTower):
    """VideoPrism-LvT's vision tower (Zhao et al., 2024, arXiv:2402.13217).

    Args:
        frames: Number of frames of a video.
        image_size: Side of the square frames, in pixels.
        patch_size: Side of a patch, in pixels.
        width: Width of the tokens, and of the embedding.
        depth: Number of blocks over the patches of a frame.
        time_depth: Number of blocks over the frames of a patch.
        joint_depth: Number of blocks over all patches of all frames.
        heads: Number of attention heads.
        mlp_dim: Width of the hidden layer of a block's MLP, and of the pooling.
        softcap: Bound of the attention logits.
        norm_eps: Epsilon of the layer norms.

    Example:
        >>> from vlm.config import VideoPrismConfig
        >>> VideoPrismConfig(frames=8).tokens()
        256
    """

    kind: ClassVar[str] = "videoprism"
    attends: ClassVar[bool] = True
    projection: ClassVar[str] = "none"

    frames: int = 16
    image_size: int = 288
    patch_size: int = 18
    width: int = 768
    depth: int = 12
    time_depth: int = 4
    joint_depth: int = 2
    heads: int = 12
    mlp_dim: int = 3072
    softcap: float = 50.0
    norm_eps: float = 1e-6

    def check(self):
        check_heads(self)
        super().check()
        if self.mlp_dim % self.heads:
            raise ConfigError(
                f"VideoPrismConfig.mlp_dim {self.mlp_dim} is not a multiple of heads {self.heads}, "
                "as the pooling needs: choose heads that divide it"
            )

    def tokens(self, image_size: int | None = None, *, training: bool = False) -> int:
        """Number of tokens of a frame."""
        return ((image_size or self.image_size) // self.patch_size) ** 2


@dataclass(frozen=True)
class XCLIPConfig(_VideoTower):
    """X-CLIP's vision tower, with prompts of texts that depend on the video (arXiv:2208.02816).

    Args:
        frames: Number of frames of a video.
        image_size: Side of the square frames, in pixels.
        patch_size: Side of a patch, in pixels.
        width: Width of the tokens in the blocks of a frame.
        depth: Number of those blocks. In each, the frames exchange a message.
        heads: Number of attention heads of those blocks.
        mlp_dim: Width of the hidden layer of a block's MLP.
        frame_depth: Number of blocks of the multi-frame integration transformer, over the frames'
            embeddings.
        frame_heads: Number of attention heads of those blocks.
        frame_mlp_dim: Width of the hidden layer of their MLPs.
        prompt_depth: Number of blocks that add a video's features to a text.
        prompt_heads: Number of attention heads of those blocks.
        norm_eps: Epsilon of the layer norms.

    Example:
        >>> from vlm.config import XCLIPConfig
        >>> XCLIPConfig(frames=16).video_frames
        16
    """

    kind: ClassVar[str] = "xclip"
    attends: ClassVar[bool] = True
    activation: ClassVar[Literal["quick_gelu"]] = "quick_gelu"  # of all published models

    frames: int = 8
    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    frame_depth: int = 1
    frame_heads: int = 8
    frame_mlp_dim: int = 2048
    prompt_depth: int = 2
    prompt_heads: int = 8
    norm_eps: float = 1e-5

    def check(self):
        check_heads(self)
        super().check()

    def tokens(self, image_size: int | None = None, *, training: bool = False) -> int:
        """Number of tokens of a frame: its patches, a class token and a message."""
        return ((image_size or self.image_size) // self.patch_size) ** 2 + 2

    def check_space(self, embed_dim: int) -> None:
        """Raise a ConfigError if the tower cannot embed into `embed_dim` dimensions."""
        for name in ("frame_heads", "prompt_heads"):
            if embed_dim % getattr(self, name):
                raise ConfigError(
                    f"XCLIPConfig.{name} {getattr(self, name)} does not divide embed_dim "
                    f"{embed_dim}: choose one that does"
                )
