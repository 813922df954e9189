"""What a model is: its towers, and the space that they share."""

from dataclasses import dataclass, field
from typing import Literal

from vlm.config.bounds import check_bounds
from vlm.config.towers import (
    Activation,
    VisionTowerConfig,
    ViTConfig,
    check_heads,
    check_projection,
)
from vlm.errors import ConfigError


@dataclass(frozen=True)
class TextConfig:
    """A text transformer: causal with end-token pooling (CLIP), or bidirectional (SigLIP)."""

    vocab_size: int = 32_000
    context_length: int = 64
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    causal: bool = False
    # argmax: at the highest id, which in OpenAI's vocabulary is the end token; class: at a learned
    # last token (CoCa).
    pool: Literal["end", "argmax", "first", "last", "class", "mean", "map"] = "last"
    end_id: int | None = None  # of pool="end": the token whose first occurrence is pooled at
    pad_id: int | None = None  # set: padding is masked in attention and in mean or MAP pooling
    layer_scale: bool = False
    # post: after each residual sum and after the embeddings, none at the end (BERT).
    norm: Literal["pre", "post"] = "pre"
    # mlp: two layers without biases, their mean width between them.
    projection: Literal["none", "linear", "linear_bias", "mlp"] = "linear_bias"
    activation: Activation = "gelu_tanh"
    norm_eps: float = 1e-6
    dropout: float = 0.0

    def __post_init__(self):
        check_bounds(self)
        check_heads(self)
        if self.pool == "end" and self.end_id is None:
            raise ConfigError('TextConfig.pool "end" needs end_id, the id of the end token: set it')

    def tokens(self, *, masking: float = 0.0) -> int:
        """Tokens that the blocks see of a text, the class token included.

        `masking` is the share of its places that training leaves out.
        """
        return kept_tokens(self.context_length, masking) + (self.pool == "class")

    def check_space(self, embed_dim: int) -> None:
        """Refuse a space that the tower cannot embed into."""
        check_projection(self, embed_dim)


def kept_tokens(count: int, masking: float, specials: int = 0) -> int:
    """How many of a text's `count` places stay where a share `masking` is left out."""
    return max(1, specials, round(count * (1 - masking)))


@dataclass(frozen=True)
class ModelConfig:
    """Two towers into one space of `embed_dim` dimensions, and the scale and bias of the logits."""

    vision: VisionTowerConfig = field(default_factory=ViTConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed_dim: int = 768
    loss: Literal["softmax", "sigmoid"] = "softmax"  # also the rule that turns logits into scores
    init_scale: float = 1 / 0.07  # of `exp(logit_scale)`
    init_bias: float | None = None  # None: no bias (CLIP); SigLIP starts at -10

    def __post_init__(self):
        check_bounds(self)
        self.vision.check_space(self.embed_dim)
        self.text.check_space(self.embed_dim)
