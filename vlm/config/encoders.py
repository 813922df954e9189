"""Config of text encoders without a table of positions: ModernBERT and (m)T5."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlm.config.base import Config, kept_tokens
from vlm.config.bounds import check_projection
from vlm.errors import ConfigError


@dataclass(frozen=True)
class EncoderTextConfig(Config):
    """A bidirectional text encoder with rotary positions (ModernBERT) or relative ones (mT5's).

    Linear layers have no biases, norms come before each branch, MLPs are gated, and padding is
    masked.

    Args:
        vocab_size: Number of tokens in the vocabulary.
        context_length: Number of tokens in a text.
        width: Width of the tokens in the blocks.
        depth: Number of blocks.
        heads: Number of attention heads.
        head_dim: Width of an attention head.
        mlp_dim: Width of the hidden layer of a block's MLP.
        positions: Position encoding. rotary: rotated queries and keys, a norm of the embeddings,
            and local attention in most blocks (ModernBERT, arXiv:2412.13663); relative: a learned
            logit for each head and range of distances, which all blocks share, root mean square
            norms, and attention that is not scaled (T5, arXiv:1910.10683).
        global_every: For rotary: every block of this number, from the first on, attends to all
            tokens.
        window: For rotary: largest distance in tokens between a token and those that it attends to
            in the other blocks.
        rotary_bases: For rotary: base of the wavelengths in global and in local blocks.
        buckets: For relative: number of ranges of distances.
        max_distance: For relative: distance from which on all are in one range.
        pool: Pooling: the first token, or the mean or maximum of all.
        pad_id: Id of the padding.
        projection: Layer from the pooled token to the shared space. mlp: two layers without
            biases; the hidden width is the mean of both widths.
        norm_eps: Epsilon of the norms.
        dropout: Dropout rate in training.

    Example:
        >>> from vlm.config import EncoderTextConfig
        >>> EncoderTextConfig(context_length=77).tokens()
        77
    """

    kind: ClassVar[str] = "encoder"

    vocab_size: int = 50_368
    context_length: int = 64
    width: int = 768
    depth: int = 22
    heads: int = 12
    head_dim: int = 64
    mlp_dim: int = 1152
    positions: Literal["rotary", "relative"] = "rotary"
    global_every: int = 3
    window: int = 64
    rotary_bases: tuple[float, float] = (160_000.0, 10_000.0)
    buckets: int = 32
    max_distance: int = 128
    pool: Literal["first", "mean", "max"] = "first"
    pad_id: int = 0
    projection: Literal["none", "linear", "mlp"] = "linear"
    norm_eps: float = 1e-5
    dropout: float = 0.0

    def check(self):
        if self.positions == "relative":
            fix = 'set positions to "rotary"'
            self.refuse_unused(fix, "global_every", "window", "rotary_bases")
            if self.buckets < 4 or self.buckets % 4:
                raise ConfigError(
                    f"EncoderTextConfig.buckets {self.buckets}: choose a multiple of 4, for both "
                    "directions and for near and far"
                )
            if self.max_distance <= self.buckets // 4:
                raise ConfigError(
                    f"EncoderTextConfig.max_distance {self.max_distance} is within the "
                    f"{self.buckets // 4} distances that have a range of their own: choose more"
                )
        else:
            self.refuse_unused('set positions to "relative"', "buckets", "max_distance")
            if self.head_dim % 2:
                raise ConfigError(
                    f"EncoderTextConfig.head_dim {self.head_dim}: rotary positions rotate pairs of "
                    "channels: choose an even number"
                )

    def tokens(self, *, masking: float = 0.0) -> int:
        """Number of tokens in the blocks; `masking` is the dropped fraction."""
        return kept_tokens(self.context_length, masking)

    @property
    def ignores_padding(self) -> bool:
        """Whether padding at the end of a text has no influence on its embedding."""
        return True

    def check_space(self, embed_dim: int) -> None:
        """Raise a ConfigError if the tower cannot embed into `embed_dim` dimensions."""
        check_projection(self, embed_dim)
