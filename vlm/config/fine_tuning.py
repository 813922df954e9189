"""Configs of low-rank adapters and of distillation."""

from dataclasses import dataclass
from typing import Literal

from vlm.config.base import Config
from vlm.errors import ConfigError


@dataclass(frozen=True)
class AdapterConfig(Config):
    """Low-rank adapters of a frozen model's linear layers (LoRA, or DoRA).

    Args:
        rank: Rank of the LoRA adapters.
        alpha: The product of the factors is multiplied by alpha / rank.
        targets: Layers to adapt, as patterns of their names, such as "text.*" or
            "*.attention.query". Empty: all projections of attention and all layers of MLPs.
        dora: Also train the norm of each column of the adapted kernels (DoRA).
        quantize: Storage of the frozen kernels. int8: a quarter of the memory, with a scale for
            each output.

    Example:
        >>> from vlm.config import AdapterConfig
        >>> AdapterConfig(rank=8, alpha=16.0).scale
        2.0
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    dora: bool = False
    quantize: Literal["none", "int8"] = "none"

    @property
    def scale(self) -> float:
        """Factor of the product."""
        return self.alpha / self.rank if self.rank else 0.0


@dataclass(frozen=True)
class DistillConfig(Config):
    """Distillation from a frozen teacher, in addition to the loss of the pairs.

    Args:
        teacher: The teacher, as in `vlm.load`. It embeds every batch.
        stored: In place of a teacher: a folder of its embeddings, from `vlm data reinforce`.
        task: Weight of the run's own loss.
        relations: Weight of the divergence of the student's similarities within a batch from the
            teacher's (arXiv:2311.17049).
        features: Weight of the distance of the student's embeddings from the teacher's.
        distance: Distance of embeddings. cosine: one minus their cosine; mse: their squared
            distance.
        projection: Learn a linear layer from the student's space to the teacher's, for features
            of another width. It is not saved with the model.
        temperature: Divisor of the teacher's cosines. None: its own temperature.

    Example:
        >>> from vlm.config import DistillConfig
        >>> DistillConfig(teacher="ViT-L-14/", features=0.5, distance="mse").task
        0.25
    """

    teacher: str = ""
    stored: str | None = None
    task: float = 0.25
    relations: float = 0.75
    features: float = 0.0
    distance: Literal["cosine", "mse"] = "cosine"
    projection: bool = False
    temperature: float | None = None

    def check(self):
        if not self.relations + self.features:
            raise ConfigError(
                "distill.relations and distill.features are both 0, so nothing is learned from the "
                "teacher: give one of them a weight"
            )
        if not self.features:
            self.refuse_unused("give features a weight", "distance")
        if not self.relations:
            self.refuse_unused("give relations a weight", "temperature")
        if self.projection and not self.features:
            raise ConfigError(
                "distill.projection is for features, which have no weight: set distill.features"
            )
