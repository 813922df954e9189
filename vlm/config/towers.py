"""Configs of the vision towers: one class for each kind, a `VisionTower` of `vlm.config.base`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlm.config.absent_towers import NoVisionConfig
from vlm.config.base import VisionTower
from vlm.config.bounds import check_activation, check_grid_pool, check_heads
from vlm.config.code import ImportPath
from vlm.config.efficientnet import EfficientNetConfig
from vlm.config.fastvit import FastViTConfig
from vlm.config.groupvit import GroupViTConfig
from vlm.config.module_towers import VisionModuleConfig
from vlm.config.qformer import QFormerConfig
from vlm.config.resnet_v1 import ResNetV1Config
from vlm.config.swin import SwinConfig
from vlm.config.video_towers import VideoPrismConfig, XCLIPConfig
from vlm.errors import ConfigError

# Activation functions of a tower.
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu"]
# Kinds of MLP in a transformer block. swiglu: EVA-02's, whose gated hidden layer is normalised;
# swiglu_plain: DINOv2's, which is not; geglu: ViTamin's, which normalises its input a second time;
# geglu_plain: JinaBERT's, which does not.
MlpKind = Literal["plain", "swiglu", "swiglu_plain", "geglu", "geglu_plain"]
# Kinds of norm in a transformer. rms: RMSNorm, without mean and bias (AIMv2).
NormKind = Literal["layer", "rms"]


@dataclass(frozen=True)
class ViTConfig(VisionTower):
    """A Vision Transformer (Dosovitskiy et al., 2021, arXiv:2010.11929).

    Args:
        image_size: Side of the square image, in pixels.
        patch_size: Side of a patch, in pixels: each is a token.
        width: Width of the tokens in the blocks.
        depth: Number of blocks.
        heads: Number of attention heads; they divide the width.
        mlp_dim: Width of the hidden layer of a block's MLP.
        stem: Patch embedding. linear: one layer; conv: 3x3 convolutions of stride 2
            (arXiv:2106.14881); nested: patches of patches with batch norms between them
            (MobileCLIP-B).
        stem_widths: Channels of the stages of a conv stem, log2(patch_size) of them; for a nested
            stem of all stages but the last.
        patch_bias: Add a bias to the patch embedding.
        rotary: Add rotary position embeddings to the learned ones, starting at this number
            (Perception Encoder). None: learned position embeddings only.
        rotary_span: Scale rotary positions to a grid of this many rows. None: no scaling.
        rotary_rows_first: Rotate the first half of the channels by the row (EVA-02).
        rotary_base: Base of the periods of rotary positions.
        rotary_centred: Rotate by the centre of a patch, where the image spans -2 pi to 2 pi
            (DINOv3).
        pool: Pooling. class: a learned first token; mean: of all tokens; map: attention pooling
            (SigLIP); class_map: the same with a gated MLP, added to the first token
            (nomic-embed-vision); query: CoCa's attentional pooler; probe: attention of a learned
            query without a projection, norm or MLP (AIMv2); qformer: several vectors, by a Q-Former
            (BLIP-2); class_mean: the class token beside the mean of the patches (dino.txt).
        pool_heads: Number of heads of map, query and probe pooling. None: `heads`.
        pool_mlp_dim: Width of the hidden layer of map pooling's MLP. None: `mlp_dim`.
        class_token: Add a learned first token, also with other kinds of pooling.
        registers: Number of learned register tokens before the patches (arXiv:2309.16588).
        pre_norm: Add a norm between the embedding and the blocks (CLIP).
        stem_norm: Add a norm between the patch embedding and the positions (AIMv2).
        last_norm: Add a norm after the blocks; InternVL has none.
        norm_pooled: Normalise after mean pooling, in place of before it.
        layer_scale: Learn a scale for each channel of each branch of a block (arXiv:2103.17239).
        norm: Position of the layer norms. pre: before each branch; branch: after each branch,
            before the residual sum (EVA-02-E).
        norm_kind: Kind of the norms. layer: LayerNorm; rms: RMSNorm, without mean and bias (AIMv2).
        mlp: Kind of MLP. plain: two layers; swiglu: gated, with a norm of the hidden layer
            (EVA-02); swiglu_plain: gated, without that norm (DINOv2, TIPSv2); geglu: gated, with
            two norms of the input (ViTamin); geglu_plain: gated, without the second of them.
        attention_norm: Add a norm before the output layer of attention (EVA-02).
        key_bias: Add a bias to the keys of attention.
        qk_norm: Add an RMSNorm to all channels of the queries and of the keys (InternVL-6B).
        pooler: For pool class: a linear layer and a tanh after the norm (transformers' ViTModel).
        position: Add learned positions to the tokens; DINOv3 has rotary ones only.
        projection: Layer from the pooled token to the shared space. mlp_bias: two layers, the first
            with a bias; the hidden width is 2 * embed_dim.
        activation: Activation of the plain MLP, and of map pooling's; also a function of `jax.nn`.
        norm_eps: Epsilon of the layer norms.
        mlp_norm_eps: Epsilon of the norm in a gated MLP. None: norm_eps.
        max_patches: For NaFlex (SigLIP 2), which accepts any aspect ratio: maximum number of
            patches; image_size is then that of the grid of positions. None: square images.
        dropout: Dropout rate in training.
        patch_dropout: Fraction of patches dropped in training (FLIP).
        qformer: For pool qformer: the Q-Former.
        head_depth: For pool class_mean: number of blocks between the norm and the pooling, without
            positions; they have layer scales, a swiglu_plain MLP, and a norm after them.
        head_mlp_dim: Width of the hidden layer of these blocks' MLP. None: `mlp_dim`.

    Example:
        >>> vlm.ViTConfig(image_size=224, patch_size=16, pool="map").tokens()
        196
        >>> vlm.ViTConfig(width=100, heads=12)
        Traceback (most recent call last):
            ...
        vlm.errors.ConfigError: ...
    """

    kind: ClassVar[str] = "vit"
    attends: ClassVar[bool] = True

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    stem: Literal["linear", "conv", "nested"] = "linear"
    stem_widths: tuple[int, ...] = ()
    patch_bias: bool = True
    rotary: int | None = None
    rotary_span: int | None = None
    rotary_rows_first: bool = False
    pool: Literal[
        "class", "mean", "map", "class_map", "query", "probe", "qformer", "class_mean"
    ] = "map"
    pool_heads: int | None = None
    pool_mlp_dim: int | None = None
    class_token: bool = False
    registers: int = 0
    pre_norm: bool = False
    norm_pooled: bool = False
    layer_scale: bool = False
    norm: Literal["pre", "branch"] = "pre"
    mlp: MlpKind = "plain"
    attention_norm: bool = False
    key_bias: bool = True
    projection: Literal["none", "linear", "linear_bias", "mlp_bias"] = "none"
    activation: Activation | ImportPath = "gelu_tanh"
    norm_eps: float = 1e-6
    max_patches: int | None = None
    dropout: float = 0.0
    patch_dropout: float = 0.0
    rotary_base: float = 10_000.0
    rotary_centred: bool = False
    pooler: bool = False
    position: bool = True
    stem_norm: bool = False
    norm_kind: NormKind = "layer"
    last_norm: bool = True
    mlp_norm_eps: float | None = None
    qk_norm: bool = False
    qformer: QFormerConfig | None = None
    head_depth: int = 0
    head_mlp_dim: int | None = None

    def check(self):
        check_heads(self)
        check_activation(self)
        if self.rotary is None:
            self.refuse_unused("set rotary", "rotary_base", "rotary_centred")
        if self.pooler and self.pool != "class":
            raise ConfigError(
                f"ViTConfig.pooler follows the class token, and pool is {self.pool!r}: set pool to "
                '"class"'
            )
        if self.pool in ("query", "qformer") and self.projection == "none":
            raise ConfigError(
                f'ViTConfig.pool "{self.pool}" needs a projection: set it to "linear"'
            )
        if self.pool != "class_mean":
            self.refuse_unused('set pool to "class_mean"', "head_depth", "head_mlp_dim")
        if (self.pool == "qformer") != (self.qformer is not None):
            raise ConfigError(
                f'ViTConfig.pool is "{self.pool}" and qformer {self.qformer}: a Q-Former needs both'
            )
        # Pixels left over at the right and bottom are ignored, as in SigLIP So400m/14@384.
        super().check()
        if self.stem == "linear":
            self.refuse_unused('set stem to "conv" or "nested"', "stem_widths")
        if self.stem == "conv" and 2 ** len(self.stem_widths) != self.patch_size:
            raise ConfigError(
                f"a conv stem of {len(self.stem_widths)} stages makes patches of "
                f"{2 ** len(self.stem_widths)} pixels, not {self.patch_size}: give "
                "log2(patch_size) stem_widths"
            )
        if self.stem == "nested" and self.patch_size % 2 ** len(self.stem_widths):
            raise ConfigError(
                f"a nested stem halves {len(self.stem_widths)} times, which patch_size "
                f"{self.patch_size} cannot: give fewer stem_widths"
            )
        more = self.prefix_tokens or self.rotary is not None or self.pre_norm or not self.position
        more = more or self.stem_norm
        plain = self.stem == "linear" and self.pool in ("map", "mean") and not more
        if self.max_patches is not None and not plain:
            raise ConfigError(
                f"ViTConfig.max_patches {self.max_patches} is only valid for NaFlex: remove "
                "class_token, registers, rotary, stem_norm and pre_norm, and set position=True, "
                'stem="linear" and pool="map" or "mean"'
            )
        if self.stem == "conv" and self.image_size % self.patch_size:
            raise ConfigError(
                f"a conv stem halves the image until patches of {self.patch_size} pixels are "
                f"left, and image_size {self.image_size} is no multiple of that: choose one"
            )

    @property
    def has_class_token(self) -> bool:
        return self.class_token or self.pool in ("class", "class_map", "class_mean")

    @property
    def prefix_tokens(self) -> int:
        """Number of class and register tokens."""
        return self.has_class_token + self.registers

    @property
    def pooled_width(self) -> int:
        """Width of the pooled token; CoCa's pooler also changes it to that of the embedding."""
        if self.qformer is not None:
            return self.qformer.width
        return 2 * self.width if self.pool == "class_mean" else self.width

    @property
    def vectors(self) -> int:
        return 1 if self.qformer is None else self.qformer.queries

    @property
    def one_size(self) -> str | None:
        # At another size, timm scales rotary positions to the trained grid.
        free = self.rotary is None or self.rotary_centred
        return None if free else "tower with rotary positions"

    def tokens(self, image_size: int | None = None, *, training: bool = False) -> int:
        """Number of tokens in the blocks for an image of `image_size` pixels (None: the default).

        Includes class and register tokens; with `training`, excludes dropped patches.
        """
        patches = ((image_size or self.image_size) // self.patch_size) ** 2
        if self.max_patches is not None and image_size is None:
            patches = self.max_patches
        if training and self.patch_dropout:
            patches = max(1, round(patches * (1 - self.patch_dropout)))
        return patches + self.prefix_tokens


@dataclass(frozen=True)
class ResNetConfig(VisionTower):
    """OpenAI's ResNet with attention pooling, which also projects (arXiv:2103.00020).

    Args:
        image_size: Side of the square image, in pixels.
        depths: Number of blocks in each stage.
        width: Channels of the stem; each stage doubles them.
        heads: Number of heads of the attention pool.

    Example:
        >>> vlm.ResNetConfig(depths=(3, 4, 6, 3)).patch_size
        32
    """

    kind: ClassVar[str] = "resnet"
    attends: ClassVar[bool] = True

    image_size: int = 224
    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    heads: int = 32

    def check(self):
        super().check()
        if not self.depths:
            raise ConfigError("ResNetConfig.depths is empty: give one for each stage")
        if self.pooled_width % self.heads:
            raise ConfigError(
                f"ResNetConfig pools {self.pooled_width} channels, which is not a multiple of "
                f"heads {self.heads}: choose heads that divide it"
            )

    @property
    def patch_size(self) -> int:
        return 4 * 2 ** (len(self.depths) - 1)

    @property
    def pooled_width(self) -> int:
        """Channels of the last stage: four times its blocks' width."""
        return 4 * self.width * 2 ** (len(self.depths) - 1)

    @property
    def one_size(self) -> str:
        return "ResNet tower"

    def tokens(self, image_size: int | None = None, *, training: bool = False) -> int:
        """Number of tokens of the attention pool: positions of the last stage, and their mean."""
        # The first convolution rounds an odd side up, and later ones round down.
        halved = -(-(image_size or self.image_size) // 2)
        return (halved // (self.patch_size // 2)) ** 2 + 1


@dataclass(frozen=True)
class ConvNeXtConfig(VisionTower):
    """ConvNeXt (Liu et al., 2022, arXiv:2201.03545): stages of depthwise 7x7 convolutions.

    Args:
        image_size: Side of the square image, in pixels.
        depths: Number of blocks in each stage.
        widths: Channels of each stage.
        mlp_dims: Width of the hidden layer of the blocks in each stage.
        norm_eps: Epsilon of the layer norms.
        projection: Layer from the pooled positions to the shared space. mlp: two layers, the first
            with a bias; the hidden width is 2 * embed_dim.
        pool: Pooling of the positions. mean; attention: from their mean, with learned positions, as
            in OpenAI's ResNets; rotary_attention: the same with rotary positions.

    Example:
        >>> from vlm.config import ConvNeXtConfig
        >>> ConvNeXtConfig(image_size=256).tokens()
        64
    """

    kind: ClassVar[str] = "convnext"

    image_size: int = 256
    depths: tuple[int, ...] = (3, 3, 27, 3)
    widths: tuple[int, ...] = (128, 256, 512, 1024)
    mlp_dims: tuple[int, ...] = (512, 1024, 2048, 4096)
    norm_eps: float = 1e-6
    projection: Literal["none", "linear", "linear_bias", "mlp"] = "linear"
    pool: Literal["mean", "attention", "rotary_attention"] = "mean"

    def check(self):
        counts = {len(self.depths), len(self.widths), len(self.mlp_dims)}
        if len(counts) != 1 or not self.depths:
            raise ConfigError(
                f"ConvNeXtConfig has depths {self.depths}, widths {self.widths} and mlp_dims "
                f"{self.mlp_dims}: give one of each for every stage"
            )
        check_grid_pool(self)
        super().check()

    @property
    def patch_size(self) -> int:
        return 4 * 2 ** (len(self.depths) - 1)

    @property
    def width(self) -> int:
        """Channels of the last stage."""
        return self.widths[-1]

    @property
    def one_size(self) -> str | None:
        return "tower with attention pooling" if self.pool == "attention" else None

    def tokens(self, image_size: int | None = None, *, training: bool = False) -> int:
        """Number of positions of the last stage."""
        return ((image_size or self.image_size) // self.patch_size) ** 2


@dataclass(frozen=True)
class ViTaminConfig(VisionTower):
    """ViTamin (Chen et al., 2024, arXiv:2404.02132): two stages of convolutions, then a ViT.

    Args:
        image_size: Side of the square image, in pixels.
        stem_width: Channels of the stem.
        conv_widths: Channels of the two stages of convolutions.
        conv_depths: Number of blocks in the two stages of convolutions.
        width: Width of the tokens in the blocks after them.
        depth: Number of those blocks.
        heads: Number of attention heads; they divide the width.
        mlp_dim: Width of each half of a block's gated MLP.
        position: Add learned positions to the tokens; ViTamin-XL has none.
        norm_eps: Epsilon of the layer norms.
        projection: Layer from the mean of the tokens to the shared space.

    Example:
        >>> from vlm.config import ViTaminConfig
        >>> ViTaminConfig(image_size=224).tokens()
        196
    """

    kind: ClassVar[str] = "vitamin"
    attends: ClassVar[bool] = True

    image_size: int = 224
    stem_width: int = 128
    conv_widths: tuple[int, int] = (128, 256)
    conv_depths: tuple[int, int] = (2, 4)
    width: int = 768
    depth: int = 14
    heads: int = 12
    mlp_dim: int = 1536
    position: bool = True
    norm_eps: float = 1e-6
    projection: Literal["none", "linear"] = "linear"

    def check(self):
        check_heads(self)
        super().check()
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size {self.image_size} is no multiple of {self.patch_size}, to which "
                "ViTamin's convolutions shrink it: choose one"
            )

    @property
    def patch_size(self) -> int:
        return 16

    @property
    def one_size(self) -> str:
        return "ViTamin tower"

    def tokens(self, image_size: int | None = None, *, training: bool = False) -> int:
        """Number of tokens in the blocks."""
        return ((image_size or self.image_size) // self.patch_size) ** 2


# To add one: a class above or in its own module, its name here, its module in `vlm/models/` and one
# line in `vlm/models/towers.py`.
#
# All kinds of vision towers.
VisionTowerConfig = (
    ViTConfig
    | ResNetConfig
    | FastViTConfig
    | ConvNeXtConfig
    | ViTaminConfig
    | EfficientNetConfig
    | XCLIPConfig
    | SwinConfig
    | ResNetV1Config
    | GroupViTConfig
    | VideoPrismConfig
    | VisionModuleConfig
    | NoVisionConfig
)


def from_older_form(values: dict) -> dict:
    """Convert the fields of older bundles and run folders, which had one class for all kinds.

    They have `resnet` and `fastvit` beside the ViT's fields.
    """
    values = dict(values)
    depths, fastvit = values.pop("resnet", ()), values.pop("fastvit", None)
    if depths:
        same = {name: values[name] for name in ("image_size", "width", "heads") if name in values}
        return {"kind": "resnet", "depths": depths, **same}
    if fastvit is not None:
        same = {n: values[n] for n in ("image_size", "width", "norm_eps") if n in values}
        return {"kind": "fastvit", **fastvit, **same}
    return {"kind": "vit", **values}
