"""Config of a Q-Former, which turns the patches of an image into a few vectors."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlm.config.base import Config
from vlm.config.bounds import check_heads


@dataclass(frozen=True)
class QFormerConfig(Config):
    """Querying Transformer (Li et al., 2023, arXiv:2301.12597): a BERT over learned queries.

    Args:
        queries: Number of learned queries; each is a vector of the image.
        width: Width of the queries in the blocks.
        depth: Number of blocks.
        heads: Number of attention heads; they divide the width.
        mlp_dim: Width of the hidden layer of a block's MLP.
        cross_every: Attend to the patches in every block of this number, from the first on.
        norm_eps: Epsilon of the layer norms.

    Example:
        >>> from vlm.config import QFormerConfig
        >>> vlm.ViTConfig(pool="qformer", qformer=QFormerConfig(), projection="linear_bias").vectors
        32
    """

    activation: ClassVar[Literal["gelu"]] = "gelu"  # of all published models

    queries: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    cross_every: int = 2
    norm_eps: float = 1e-12

    def check(self):
        check_heads(self)
