"""What a model takes: pixels made by one rule, and tokens made by another."""

from dataclasses import dataclass
from typing import Literal

from vlm.config.bounds import check_bounds

# Of the images that OpenAI's CLIP was trained on, which most models since keep to.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class PreprocessConfig:
    """How an image becomes the pixels a model was trained on."""

    image_size: int = 224
    # crop: short side to size, then the centre; pad: long side to size, then `fill` around it;
    # naflex: see ViTConfig.max_patches.
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

    def __post_init__(self):
        check_bounds(self)


@dataclass(frozen=True)
class TokenizerConfig:
    """The rules around a `tokenizer.json` that make text the tokens a model was trained on."""

    context_length: int = 64
    pad_id: int = 0
    bos_id: int | None = None
    eos_id: int | None = 1
    lowercase: bool = False
    # Cleaning before the vocabulary: see vlm/inputs/cleaning.py.
    clean: Literal["none", "clip", "clip_cased", "clip_canonical", "siglip", "bert"] = "none"
    keep_eos: bool = True  # a truncated text still ends with eos
    pad_side: Literal["right", "left"] = "right"
    parse_special: bool = False  # "<eos>" spelled out in a text is that token (transformers: yes)

    def __post_init__(self):
        check_bounds(self)
