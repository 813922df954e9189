"""What a model is: its towers, and the space that they share."""

from dataclasses import dataclass, field
from typing import Literal

from vlm.errors import ConfigError

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]


@dataclass(frozen=True)
class FastViTStage:
    """A stage of FastViT: `depth` blocks of one width, each a mixer of places and an MLP."""

    depth: int
    width: int
    mlp_dim: int
    heads: int = 0  # of the attention that mixes; 0: a 3x3 convolution does
    norm: bool = False  # a LayerNorm before the attention
    halve: bool = True  # begins with a 7x7 convolution of stride 2
    squeeze: int = 0  # hidden channels of that one's squeeze-and-excitation; 0: it has none
    position: bool = False  # a 7x7 convolution that gives positions (arXiv:2102.10882)


@dataclass(frozen=True)
class FastViTConfig:
    """The parts of FastViT, reparameterised (Vasu et al., 2023, arXiv:2303.14189)."""

    stem_width: int
    stages: tuple[FastViTStage, ...]
    squeeze: int  # hidden channels of squeeze-and-excitation after the last convolution

    @property
    def patch_size(self) -> int:
        """Pixels along each side of a place of the last stage."""
        return 4 * 2 ** sum(stage.halve for stage in self.stages)

    def __post_init__(self):
        inputs = self.stem_width
        for number, stage in enumerate(self.stages):
            where = f"FastViTStage {number}"
            if stage.heads and stage.width % stage.heads:
                raise ConfigError(
                    f"{where}: width {stage.width} is not a multiple of heads {stage.heads}"
                )
            if stage.width % inputs or not (stage.halve or stage.width == inputs):
                raise ConfigError(
                    f"{where}: width {stage.width} after {inputs}: a stage that halves takes a "
                    "multiple of the width before it, and another the same width"
                )
            inputs = stage.width


@dataclass(frozen=True)
class VisionConfig:
    """A Vision Transformer (Dosovitskiy et al., 2021, arXiv:2010.11929)."""

    image_size: int = 224  # pixels, square
    patch_size: int = 16  # pixels per token, along each side
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    stem: Literal["linear", "conv"] = "linear"  # conv: stride-2 3x3 stages (arXiv:2106.14881)
    stem_widths: tuple[
        int, ...
    ] = ()  # channels of the conv stages; patch_size is 2 ** their number
    patch_bias: bool = True
    # Rotary positions beside the learned ones (Perception Encoder), counted from this number.
    rotary: int | None = None
    pool: Literal["class", "mean", "map", "query"] = "map"  # query: CoCa's attentional pooler
    pool_heads: int | None = None  # of the attention in map and query pooling; None: heads
    pool_mlp_dim: int | None = None  # of map pooling; None: mlp_dim
    class_token: bool = False  # a learned first token, also where the pool is of another kind
    pre_norm: bool = False  # a LayerNorm between embedding and blocks (CLIP)
    norm_pooled: bool = False  # the final LayerNorm after mean pooling instead of before it
    layer_scale: bool = False  # learned factors on each branch of a block (arXiv:2103.17239)
    projection: Literal["none", "linear", "linear_bias"] = "none"  # pooled width -> embed_dim
    activation: Activation = "gelu_tanh"
    norm_eps: float = 1e-6
    # Blocks in the four stages of OpenAI's ResNet, which then takes the place of the ViT: `width`
    # is its stem's, `heads` its attention pool's, patch_size 32, and it is its own projection.
    resnet: tuple[int, ...] = ()
    # FastViT (MobileCLIP), likewise in the ViT's place: `width` is what is pooled, by its mean.
    fastvit: FastViTConfig | None = None
    # NaFlex (SigLIP 2): any aspect, at most this many patches; image_size is the position grid's.
    max_patches: int | None = None
    dropout: float = 0.0
    patch_dropout: float = 0.0  # share of the patches left out while training (FLIP)


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
    projection: Literal["none", "linear", "linear_bias"] = "linear_bias"
    activation: Activation = "gelu_tanh"
    norm_eps: float = 1e-6
    dropout: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """Two towers into one space of `embed_dim` dimensions, and the scale and bias of the logits."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed_dim: int = 768
    loss: Literal["softmax", "sigmoid"] = "softmax"  # also the rule that turns logits into scores
    init_scale: float = 1 / 0.07  # of `exp(logit_scale)`
    init_bias: float | None = None  # None: no bias (CLIP); SigLIP starts at -10

    def __post_init__(self):
        for tower in (self.vision, self.text):
            name = type(tower).__name__
            if tower.pool == "query" and tower.projection == "none":
                raise ConfigError(f'{name}.pool "query" needs a projection: set it to "linear"')
            if tower.width % tower.heads:
                raise ConfigError(
                    f"{name}.width {tower.width} is not a multiple of heads {tower.heads}: "
                    "choose a width that the heads divide"
                )
            if getattr(tower, "resnet", ()):
                continue
            if tower.projection == "none" and tower.width != self.embed_dim:
                raise ConfigError(
                    f"{name} has no projection, so its width {tower.width} must equal embed_dim "
                    f'{self.embed_dim}: set projection="linear" or make them equal'
                )
        vision = self.vision
        if (parts := vision.fastvit) is not None and (
            vision.width % parts.stages[-1].width
            or vision.patch_size != parts.patch_size
            or (vision.pool, vision.projection) != ("mean", "linear_bias")
        ):
            raise ConfigError(
                f"a FastViT of these stages has patch_size {parts.patch_size}, a width that is a "
                f'multiple of {parts.stages[-1].width}, pool "mean" and projection "linear_bias"'
            )
        # What is left over at the right and below is not looked at, as in SigLIP So400m/14@384.
        if vision.image_size < vision.patch_size:
            raise ConfigError(
                f"image_size {vision.image_size} holds no patch of patch_size "
                f"{vision.patch_size}: choose an image size that the patches tile"
            )
        if vision.stem == "conv" and 2 ** len(vision.stem_widths) != vision.patch_size:
            raise ConfigError(
                f"a conv stem of {len(vision.stem_widths)} stages makes patches of "
                f"{2 ** len(vision.stem_widths)} pixels, not {vision.patch_size}: give "
                "log2(patch_size) stem_widths"
            )
        if vision.stem == "conv" and vision.image_size % vision.patch_size:
            raise ConfigError(
                f"a conv stem halves the image until patches of {vision.patch_size} pixels are "
                f"left, and image_size {vision.image_size} is no multiple of that: choose one"
            )
