"""What a run learns from another model."""

from dataclasses import dataclass
from typing import Literal

from vlm.config.base import Config
from vlm.errors import ConfigError


@dataclass(frozen=True)
class DistillConfig(Config):
    """A frozen teacher, and what is learned from it beside the pairs themselves.

    Args:
        teacher: The model to learn from: whatever `vlm.load` takes. It embeds every batch.
        stored: In its place: a folder of a teacher's embeddings, made by `vlm data reinforce`.
        task: Weight of the run's own loss, that of its pairs.
        relations: Weight of the divergence of the student's similarities within a batch from the
            teacher's (arXiv:2311.17049).
        features: Weight of the distance of the student's embeddings from the teacher's.
        distance: How embeddings are compared. cosine: one minus their cosine; mse: their squared
            distance.
        projection: Learn a linear layer from the student's space to the teacher's, for features
            of another width. It is not part of the model that the run leaves.
        temperature: What the teacher's cosines are divided by. None: its own temperature.

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
