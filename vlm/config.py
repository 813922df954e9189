"""What an experiment is: frozen dataclasses, their JSON form, and the loading of `configs/*.py`.

A config file is Python that binds one name, `config`, to an `Experiment`. Everything a run does
follows from that value: it is written to the run folder as JSON and read back from there.
"""

import dataclasses
import json
import os
import runpy
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from vlm.errors import ConfigError

T = TypeVar("T")

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
# What a block keeps for its backward pass, beside its input: everything, so that nothing is
# computed again ("none"); what goes into and comes out of attention, and the MLP's hidden layer
# ("dots"); that without attention's result ("dots_no_batch"); no more ("full").
RematPolicy = Literal["none", "full", "dots", "dots_no_batch"]


# ---------------------------------------------------------------------------- the model


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


# ------------------------------------------------------------------- the input contract


@dataclass(frozen=True)
class PreprocessConfig:
    """How an image becomes the pixels a model was trained on."""

    image_size: int = 224
    # crop: short side to size, then the centre; pad: long side to size, then `fill` around it;
    # naflex: see VisionConfig.max_patches.
    resize: Literal["squash", "crop", "pad", "naflex"] = "squash"
    fill: tuple[int, int, int] = (0, 0, 0)  # pad
    patch_size: int | None = None  # naflex
    max_patches: int | None = None  # naflex
    kernel: Literal["bicubic", "bilinear", "lanczos", "nearest"] = "bicubic"
    # tensor: as torchvision does on uint8 tensors; tensorflow: as big_vision does.
    backend: Literal["pillow", "tensor", "tensorflow"] = "pillow"
    antialias: bool = True  # of the tensor backend; Pillow always does, big_vision never
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    short_side: int | None = None  # crop: what the short side becomes first; None: image_size
    crop_offset: Literal["round", "floor"] = "round"  # of odd margins: torchvision, transformers
    background: tuple[int, int, int] | None = (
        255,
        255,
        255,
    )  # under transparency; None drops alpha


@dataclass(frozen=True)
class TokenizerConfig:
    """The rules around a `tokenizer.json` that make text the tokens a model was trained on."""

    context_length: int = 64
    pad_id: int = 0
    bos_id: int | None = None
    eos_id: int | None = 1
    lowercase: bool = False
    # Cleaning before the vocabulary: see vlm/cleaning.py.
    clean: Literal["none", "clip", "clip_cased", "clip_canonical", "siglip", "bert"] = "none"
    keep_eos: bool = True  # a truncated text still ends with eos
    pad_side: Literal["right", "left"] = "right"
    parse_special: bool = False  # "<eos>" spelled out in a text is that token (transformers: yes)


# ------------------------------------------------------------------------------ the data


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of a training image."""

    crop: tuple[float, float] = (0.9, 1.0)  # share of the image's area that a crop keeps
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    jitter: float = 0.0  # brightness, contrast, saturation: factors in 1 +- jitter
    hue: float = 0.0  # in turns of the colour circle, at most 0.5
    flip: bool = False


@dataclass(frozen=True)
class DataConfig:
    """Where pairs come from. A caption is drawn at random from all `captions` of an image."""

    source: str = "openmoji"  # "openmoji", "tfds:NAME", or a path that says what it is
    train_split: str = "train"
    eval_split: str | None = "test"
    image: str = "image"
    captions: tuple[str, ...] = ("caption",)
    label: str | None = None  # a class-label feature instead of captions, put into `templates`
    templates: tuple[str, ...] = ("{}",)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    cache: bool = False  # keep decoded images in memory
    workers: int = 0  # reader processes; 0 reads in threads of this process
    prefetch: int = 2  # batches made ahead of the step
    data_dir: str | None = None  # where prepared data lives; None: the cache folder


# --------------------------------------------------------------------------- the training


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule, its schedule and its safeguards."""

    name: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "rsqrt", "wsd", "constant"] = "cosine"
    warmup: float = 0.05  # share of the run's steps
    cooldown: float = 0.2  # share of the run's steps that rsqrt and wsd take to decay
    weight_decay: float = 0.1  # on matrices, never on norms, biases, scale or embeddings' bias
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6
    clip_norm: float | None = 1.0
    layer_decay: float = 1.0  # learning rate of a block relative to the block above it
    ema: float | None = None  # decay of the exponential moving average of the parameters
    max_scale: float = 100.0  # cap of exp(logit_scale): CLIP's ln(100)
    nonfinite: Literal["stop", "skip"] = "stop"  # what a loss or gradient that is not finite does


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 and takes what is left of the devices."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class Experiment:
    """One run of `vlm train`, whole."""

    name: str = "experiment"
    model: ModelConfig = field(default_factory=ModelConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    tokenizer_file: str | None = None  # a tokenizer.json; None: the data's own vocabulary
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    batch_size: int = 1024  # global
    micro_batch_size: int | None = None  # global too; None: the whole batch at once
    # The length of the run: exactly one of these.
    steps: int | None = None
    epochs: float | None = None
    examples: int | None = None
    seconds: float | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of compute; auto: bfloat16 off CPU
    remat: RematPolicy = "dots_no_batch"
    scan: bool = True  # blocks as one scanned loop; False unrolls them
    lock: Literal["none", "vision", "text"] = "none"  # a tower that is not trained (LiT)
    init_from: str | None = None  # a model to start from: whatever `vlm.load` takes
    init_towers: Literal["both", "vision", "text"] = "both"  # what is taken of it
    # (share of the run, pixels): smaller images to begin with, as ((0.8, 112),); the rest is full.
    image_sizes: tuple[tuple[float, int], ...] = ()
    text_masking: float = 0.0  # share of a text's places left out while training, padding first
    seed: int = 0
    log_every: int = 10  # steps
    eval_every: float | None = None  # share of the run; None: at the end alone
    checkpoint_every: float = 0.25  # share of the run
    keep_checkpoints: int = 2
    profile: tuple[int, int] | None = None  # first and last step of a trace by jax.profiler
    run_dir: str | None = None  # None: runs/NAME-DATE

    def __post_init__(self):
        lengths = ("steps", "epochs", "examples", "seconds")
        given = [name for name in lengths if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(
                f"a run has one length, but {' and '.join(given)} are all set: keep one"
            )
        for name in given:
            if getattr(self, name) <= 0:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}: a run takes more than that, so make it "
                    "positive"
                )
        for name in ("batch_size", "micro_batch_size", "log_every", "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: make it at least 1")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size}: choose one that divides it"
            )
        if self.preprocess.image_size != self.model.vision.image_size:
            raise ConfigError(
                f"preprocess.image_size {self.preprocess.image_size} is not the model's "
                f"{self.model.vision.image_size}: set both to the same number"
            )
        if self.tokenizer.context_length != self.model.text.context_length:
            raise ConfigError(
                f"tokenizer.context_length {self.tokenizer.context_length} is not the model's "
                f"{self.model.text.context_length}: set both to the same number"
            )
        patch = self.model.vision.patch_size
        if any(size % patch or size < patch for _, size in self.image_sizes):
            raise ConfigError(
                f"image_sizes {self.image_sizes} are not all multiples of patch_size {patch}: "
                "choose sizes that the patches tile"
            )
        if sum(share for share, _ in self.image_sizes) > 1 or any(
            share <= 0 for share, _ in self.image_sizes
        ):
            raise ConfigError(
                f"image_sizes {self.image_sizes} must have positive shares of the run that add up "
                "to at most 1: what is left trains at the full size"
            )
        if self.image_sizes and (self.model.vision.resnet or self.model.vision.fastvit):
            raise ConfigError(
                "image_sizes needs a Vision Transformer: leave it empty for a ResNet or a FastViT"
            )
        if not 0 <= self.text_masking < 1:
            raise ConfigError(
                f"text_masking {self.text_masking} is a share of the text: choose at least 0 and "
                "below 1"
            )


# --------------------------------------------------------------------------- JSON and files


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass `config` as plain JSON values; tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Rebuild a dataclass from `to_dict`'s form.

    Raises:
        ConfigError: a field is unknown or has another type; the message names it by its path.
    """
    where = where or cls.__name__
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be an object of fields, not {values!r}")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            raise ConfigError(f"{where} has no field {name!r}: it has {', '.join(known)}")
    converted = {
        name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()
    }
    try:
        return cls(**converted)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint` asks for, or a ConfigError that names `where`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        for option in options[:-1]:
            try:
                return _convert(option, value, where)
            except ConfigError:
                continue
        return _convert(options[-1], value, where)
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{where} is {value!r}: choose one of {', '.join(map(repr, args))}")
    if origin is tuple:
        if isinstance(value, list | tuple):
            inner = [args[0]] * len(value) if args[-1] is Ellipsis else args
            if len(inner) == len(value):
                return tuple(_convert(a, v, where) for a, v in zip(inner, value, strict=True))
            raise ConfigError(f"{where} takes {len(args)} values, not {value!r}")
        raise ConfigError(f"{where} must be a list, not {value!r}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any or (isinstance(value, hint) and (hint is bool or not isinstance(value, bool))):
        return value
    raise ConfigError(f"{where} must be {hint.__name__}, not {value!r}")


def check_types(config: T) -> T:
    """The same config, after a check of every field against its declared type."""
    return from_dict(type(config), to_dict(config))


def load_config(path: str | os.PathLike) -> Experiment:
    """The `Experiment` that a config file binds to the name `config`; also reads a run's JSON.

    Raises:
        ConfigError: no such file, an error inside it, or no Experiment in it.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ConfigError(
            f"there is no config file {path!r}: give the path of a Python file that binds "
            "`config`, such as configs/openmoji.py"
        )
    if path.endswith(".json"):
        try:
            with open(path, encoding="utf-8") as f:
                return from_dict(Experiment, json.load(f))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from None
    try:
        names = runpy.run_path(path)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path} failed with {type(error).__name__}: {error}") from error
    config = names.get("config")
    if not isinstance(config, Experiment):
        raise ConfigError(f"{path} binds no `config` of type vlm.Experiment: add `config = ...`")
    return check_types(config)
