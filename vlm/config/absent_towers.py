"""Configs in place of a tower that a model does not have."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlm.config.base import Config, VisionTower


@dataclass(frozen=True)
class NoTextConfig(Config):
    """No text tower: the model embeds images alone, as DINOv2 does.

    Example:
        >>> from vlm.config import NoTextConfig
        >>> NoTextConfig().tokens()
        0
    """

    kind: ClassVar[str] = "none"

    vocab_size: ClassVar[int] = 1  # of a tokenizer with its padding alone
    context_length: ClassVar[int] = 1
    width: ClassVar[int] = 1

    def tokens(self, *, masking: float = 0.0) -> int:
        """Number of tokens: none."""
        return 0

    def check_space(self, embed_dim: int) -> None:
        """Do nothing: there is nothing to embed."""


@dataclass(frozen=True)
class NoVisionConfig(VisionTower):
    """No vision tower: the model embeds texts alone, as CLIPTextModel does.

    Example:
        >>> from vlm.config import NoVisionConfig
        >>> NoVisionConfig().tokens()
        0
    """

    kind: ClassVar[str] = "none"

    image_size: ClassVar[int] = 1  # of the preprocessing that is not used
    patch_size: ClassVar[int] = 1
    width: ClassVar[int] = 1

    @property
    def one_size(self) -> str:
        return "model without a vision tower"

    def tokens(self, image_size: int | None = None, *, training: bool = False) -> int:
        """Number of tokens: none."""
        return 0

    def check_space(self, embed_dim: int) -> None:
        """Do nothing: there is nothing to embed."""


def absence(
    tower: Literal["vision", "text"],
    config: Config,
    name: str,
    fix: str = "load it with tower='both'",
) -> str:
    """Return the sentence of an error: a model has no such tower, or was loaded without it.

    `config` is that of the tower, and `fix` follows if the checkpoint has the tower.
    """
    if isinstance(config, NoTextConfig | NoVisionConfig):
        both = "use a model with both towers, such as ViT-B-32"
        if tower == "text":
            both = (
                "fit a FewShotClassifier to labelled images, add the text tower of its space with "
                f"Bundle.with_text or `vlm convert --text`, or {both}"
            )
        other = {"text": "images", "vision": "texts"}[tower]
        return f"{name} has no {tower} tower and embeds {other} alone: {both}"
    return f"{name} was loaded without its {tower} tower: {fix}"
