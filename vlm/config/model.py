"""Configs of the text tower and of the whole model."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from vlm.config.absent_towers import NoTextConfig
from vlm.config.base import Config, kept_tokens
from vlm.config.bounds import check_activation, check_heads, check_projection
from vlm.config.code import ImportPath
from vlm.config.encoders import EncoderTextConfig
from vlm.config.module_towers import MeshAxis, TextModuleConfig
from vlm.config.towers import (
    Activation,
    MlpKind,
    NormKind,
    VisionTowerConfig,
    ViTConfig,
    from_older_form,
)
from vlm.errors import ConfigError

# Contrastive losses.
Loss = Literal["softmax", "sigmoid"]
# How logits of a model with this loss become scores of labels.
LOSS_SCORES: dict[Loss, Literal["softmax", "sigmoid"]] = {
    "softmax": "softmax",
    "sigmoid": "sigmoid",
}
# Poolings of a text tower: how the positions become one vector.
TextPool = Literal["end", "argmax", "first", "last", "class", "appended", "mean", "max", "map"]


@dataclass(frozen=True)
class TextConfig(Config):
    """A text transformer: causal with end-token pooling (CLIP), or bidirectional (SigLIP).

    Args:
        vocab_size: Number of tokens in the vocabulary.
        context_length: Number of tokens in a text.
        width: Width of the tokens in the blocks.
        depth: Number of blocks.
        heads: Number of attention heads; they divide the width.
        mlp_dim: Width of the hidden layer of a block's MLP.
        causal: Use causal attention, as CLIP does.
        pool: Pooling. end: the first end token; argmax: the token of the highest id, which in
            OpenAI's vocabulary is the end token; first, last: by position; class: a learned last
            token (CoCa); appended: one without a position (VideoPrism); mean, max: of all; map:
            attention pooling.
        end_id: For pool end: id of the end token.
        positions: Position embeddings. learned: a table; sinusoidal: fixed sines, then cosines
            (arXiv:1706.03762, in the layout of tensor2tensor); rotary: rotated queries and keys
            (arXiv:2104.09864), in halves of a head; alibi: logits that fall with the distance
            (arXiv:2108.12409), in both directions.
        rotary_base: For rotary: base of the wavelengths.
        scale_embedding: Multiply token embeddings by the square root of the width.
        pad_id: Id of the padding, to mask it in attention and in mean, max and map pooling. None:
            no mask.
        layer_scale: Learn a scale for each channel of each branch of a block (arXiv:2103.17239).
        norm: Position of the layer norms. pre: before each branch; post: after each residual sum
            and after the embeddings (BERT); branch: after each branch, before the residual sum.
        norm_kind: Kind of the norms. layer: LayerNorm; rms: RMSNorm, without mean and bias (AIMv2).
        mlp: Kind of MLP. plain: two layers; the others are gated, as in `ViTConfig`.
        embedding_norm: For norm pre: add a norm after the embeddings, as norm post has (FLAVA).
        last_norm: For norm post: one more norm after the blocks (AltCLIP).
        pooler: For norm post: a linear layer and a tanh after pooling (BERT's pooler).
        softcap: Bound of the attention logits, by a tanh (VideoPrism). None: no bound.
        projection: Layer from the pooled token to the shared space. mlp: two layers without
            biases; the hidden width is the mean of both widths; mlp_relu: two layers with biases
            and a ReLU (GroupViT).
        projection_dim: For projection mlp_relu: width of its hidden layer.
        activation: Activation of the MLPs; also a function of `jax.nn`.
        norm_eps: Epsilon of the layer norms.
        dropout: Dropout rate in training.

    Example:
        >>> vlm.TextConfig(causal=True, pool="argmax", context_length=77).tokens()
        77
    """

    kind: ClassVar[str] = "transformer"

    vocab_size: int = 32_000
    context_length: int = 64
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    causal: bool = False
    pool: TextPool = "last"
    end_id: int | None = None
    positions: Literal["learned", "sinusoidal", "rotary", "alibi"] = "learned"
    scale_embedding: bool = False
    pad_id: int | None = None
    layer_scale: bool = False
    norm: Literal["pre", "post", "branch"] = "pre"
    last_norm: bool = False
    pooler: bool = False
    projection: Literal["none", "linear", "linear_bias", "mlp", "mlp_relu"] = "linear_bias"
    activation: Activation | ImportPath = "gelu_tanh"
    norm_eps: float = 1e-6
    dropout: float = 0.0
    norm_kind: NormKind = "layer"
    softcap: float | None = None
    mlp: MlpKind = "plain"
    embedding_norm: bool = False
    projection_dim: int = 4096
    rotary_base: float = 10_000.0

    def check(self):
        check_heads(self)
        check_activation(self)
        if self.pool == "end" and self.end_id is None:
            raise ConfigError('TextConfig.pool "end" needs end_id, the id of the end token: set it')
        if self.pooler and self.norm != "post":
            raise ConfigError('TextConfig.pooler is BERT\'s, which has norm="post": set that too')
        if self.positions != "rotary":
            self.refuse_unused('set positions to "rotary"', "rotary_base")
        elif self.width // self.heads % 2:
            raise ConfigError(
                f"TextConfig.heads {self.heads} of width {self.width} have an odd number of "
                "channels, and rotary positions rotate pairs of them: choose other heads"
            )
        if self.positions == "alibi" and self.causal:
            raise ConfigError(
                'TextConfig.positions "alibi" is for attention in both directions: set causal=False'
            )

    def tokens(self, *, masking: float = 0.0) -> int:
        """Number of tokens in the blocks, with a class token; `masking` is the dropped fraction."""
        return kept_tokens(self.context_length, masking) + (self.pool in ("class", "appended"))

    @property
    def ignores_padding(self) -> bool:
        """Whether padding at the end of a text has no influence on its embedding."""
        if self.pool in ("last", "class", "appended"):  # read by position
            return False
        return self.pad_id is not None or (self.causal and self.pool in ("end", "argmax"))

    def check_space(self, embed_dim: int) -> None:
        """Raise a ConfigError if the tower cannot embed into `embed_dim` dimensions."""
        check_projection(self, embed_dim)


# All kinds of text towers.
TextTowerConfig = TextConfig | EncoderTextConfig | TextModuleConfig | NoTextConfig


@dataclass(frozen=True)
class ModelConfig(Config):
    """Config of a dual encoder: two towers, the shared space, and the scale and bias of logits.

    Args:
        vision: The vision tower.
        text: The text tower.
        embed_dim: Dimensions of the shared space.
        loss: Contrastive loss. It also converts logits to scores. softmax: CLIP's; sigmoid:
            SigLIP's.
        init_scale: Initial logit scale, the factor of the cosines.
        init_bias: Initial bias of the logits. None: no bias (CLIP); SigLIP starts at -10.
        full_dim: Width of the towers' embeddings, which are truncated to embed_dim before they are
            normalised (Matryoshka, arXiv:2205.13147). None: embed_dim, no truncation.
        matryoshka: Sizes of truncated embeddings that the model was trained for. Empty: unknown.

    Example:
        >>> config = vlm.ModelConfig(embed_dim=768, loss="sigmoid", init_bias=-10.0)
        >>> config.vision.patch_size, config.text.context_length
        (16, 64)
    """

    vision: VisionTowerConfig = field(default_factory=ViTConfig)
    text: TextTowerConfig = field(default_factory=TextConfig)
    embed_dim: int = 768
    loss: Loss = "softmax"
    init_scale: float = 1 / 0.07
    init_bias: float | None = None
    full_dim: int | None = None
    matryoshka: tuple[int, ...] = ()

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        vision = values.get("vision")
        if isinstance(vision, dict) and "kind" not in vision:
            values = values | {"vision": from_older_form(vision)}
        text = values.get("text")
        if isinstance(text, dict) and "kind" not in text:  # there was one kind
            values = values | {"text": {"kind": TextConfig.kind, **text}}
        return values

    def check(self):
        if self.vision.kind == self.text.kind == "none":
            raise ConfigError("ModelConfig has neither a vision nor a text tower: give one of them")
        if self.embed_dim > self.tower_dim:
            raise ConfigError(
                f"ModelConfig.embed_dim {self.embed_dim} is more than full_dim {self.full_dim}: "
                "embeddings are truncated to embed_dim, so choose less"
            )
        self.vision.check_space(self.tower_dim)
        self.text.check_space(self.tower_dim)

    @property
    def tower_dim(self) -> int:
        """Width of the towers' embeddings, before they are truncated."""
        return self.full_dim or self.embed_dim

    @property
    def partition(self) -> tuple[tuple[str, str, tuple[MeshAxis | None, ...]], ...]:
        """Sharding rules of module towers: tower, pattern of parameter names, and mesh axes."""
        towers = {"vision": self.vision, "text": self.text}
        return tuple(
            (name, *rule)
            for name, tower in towers.items()
            for rule in getattr(tower, "partition", ())
        )

    @property
    def text_transformer(self) -> TextConfig:
        """Config of the text tower, for code that only supports a transformer.

        Raises:
            ConfigError: there is no text tower, or it is one of another kind.
        """
        if isinstance(self.text, NoTextConfig):
            raise ConfigError(
                "the model has no text tower, which this needs: use a model with both towers"
            )
        if isinstance(self.text, EncoderTextConfig):
            raise ConfigError(
                "the text tower is a text encoder (vlm.config.EncoderTextConfig), and this needs "
                "the transformer of vlm.TextConfig: use a model that has one"
            )
        if not isinstance(self.text, TextConfig):
            raise ConfigError(
                f"the text tower is a module of your own, {self.text.module}, and this needs the "
                "transformer of vlm.TextConfig: use a model that has one"
            )
        return self.text
