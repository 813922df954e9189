"""Config of online data selection."""

from dataclasses import dataclass
from typing import Literal

from vlm.config.base import Config
from vlm.errors import ConfigError


@dataclass(frozen=True)
class SelectionConfig(Config):
    """Online data selection: train on a part of every super-batch (JEST and ACID).

    A step reads a super-batch of 1 / (1 - filter_ratio) batches, scores it, samples a batch from it
    and trains on that. `batch_size` is that of the trained batch.

    Args:
        score: Score of a batch. learnability: loss of the learner minus that of the reference
            (arXiv:2406.17711; with a reference larger than the learner, arXiv:2411.18674);
            easy_reference: minus the loss of the reference; hard_learner: loss of the learner.
        filter_ratio: Fraction of a super-batch that is not trained on: 1 - 1 / k for a super-batch
            of k batches, such as 0.5, 0.75, 0.8 or 0.9.
        chunks: Number of chunks in which a batch is sampled, each conditioned on those before.
        reference: The reference model, as in `vlm.load`. It embeds every super-batch.
        stored: In place of a reference: a folder of its embeddings, from `vlm data reinforce`.

    Example:
        >>> from vlm.config import SelectionConfig
        >>> SelectionConfig(reference="ViT-B-32", filter_ratio=0.8).super_batch
        5
    """

    score: Literal["learnability", "easy_reference", "hard_learner"] = "learnability"
    filter_ratio: float = 0.8
    chunks: int = 16
    reference: str = ""
    stored: str | None = None

    @property
    def super_batch(self) -> int:
        """Number of batches in a super-batch."""
        return round(1 / (1 - self.filter_ratio))

    def check(self):
        kept = 1 - self.filter_ratio
        if abs(kept * self.super_batch - 1) > 0.01:
            k = self.super_batch
            choices = " or ".join(f"{1 - 1 / n:.4g}" for n in sorted({max(1, k - 1), k, k + 1}))
            raise ConfigError(
                f"selection.filter_ratio {self.filter_ratio:g} makes super-batches of "
                f"{1 / kept:.4g} batches: choose one with a whole number of batches, such as "
                f"{choices}"
            )
        if self.reference and self.stored:
            raise ConfigError(
                f"selection has the reference {self.reference!r} and stored embeddings "
                f"{self.stored!r}: give one of them"
            )
        if self.score == "hard_learner" and (self.reference or self.stored):
            raise ConfigError(
                f"selection.score 'hard_learner' uses no reference, and "
                f"{self.reference or self.stored!r} is given: leave it out, or choose the score "
                '"learnability"'
            )
