"""What a model takes: pixels made by one rule, and tokens made by another."""

from dataclasses import dataclass
from typing import Literal

from vlm.config.base import Config

# Of the images that OpenAI's CLIP was trained on, which most models since keep to.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


Clean = Literal["none", "clip", "clip_cased", "clip_canonical", "siglip", "bert"]


@dataclass(frozen=True)
class PreprocessConfig(Config):
    """How an image becomes the pixels a model was trained on.

    Args:
        image_size: Side of the square that the model takes, in pixels; of naflex, of its grid of
            positions.
        resize: squash: both sides to the square; crop: the short side to size, then the centre;
            pad: the long side to size, then `pad_value` around it; naflex: any aspect within
            `max_patches`.
        pad_value: Colour (red, green, blue) around an image that is padded.
        patch_size: Of naflex: side of a patch, in pixels; the model's.
        max_patches: Of naflex: most patches that an image may have; while training, the model's.
        kernel: Interpolation of the resize.
        backend: Whose arithmetic resizes: pillow, as torchvision does with PIL images; tensor,
            as it does with uint8 tensors; tensorflow, as big_vision does.
        antialias: Whether the tensor backend widens its kernel when it shrinks an image; pillow
            always does, tensorflow never.
        mean: Mean of red, green and blue that is subtracted, of values from 0 to 1.
        std: Standard deviation of red, green and blue that is divided by.
        short_side: Of crop: length that the short side is resized to before the crop, in
            pixels; of squash: that of both sides, of which the centre is then taken (ALIGN). None:
            image_size.
        crop_rounding: How an odd margin around the centre is halved. round, as torchvision does;
            floor, as transformers does.
        background: Colour (red, green, blue) under transparent pixels. None: the alpha channel
            is dropped.
        decode: How an image file becomes RGB. intended: upright by its EXIF orientation, on
            `background` where transparent, 16 bits scaled to 8; reference: Pillow's
            Image.open(file).convert("RGB"), as the code that published figures come from.

    Example:
        >>> vlm.PreprocessConfig(image_size=224, resize="crop", kernel="bicubic").resize
        'crop'
    """

    image_size: int = 224
    resize: Literal["squash", "crop", "pad", "naflex"] = "squash"
    pad_value: tuple[int, int, int] = (0, 0, 0)
    patch_size: int | None = None
    max_patches: int | None = None
    kernel: Literal["bicubic", "bilinear", "lanczos", "nearest"] = "bicubic"
    backend: Literal["pillow", "tensor", "tensorflow"] = "pillow"
    antialias: bool = True
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    short_side: int | None = None
    crop_rounding: Literal["round", "floor"] = "round"
    background: tuple[int, int, int] | None = (
        255,
        255,
        255,
    )
    decode: Literal["intended", "reference"] = "intended"


@dataclass(frozen=True)
class TokenizerConfig(Config):
    """The rules around a `tokenizer.json` that make text the tokens a model was trained on.

    Args:
        context_length: Number of tokens in a row. A longer text loses its tail; a run counts how
            many did.
        pad_id: Token that fills a row after the text.
        bos_id: Token before the text. None: there is none.
        eos_id: Token after the text. None: there is none.
        lowercase: Make the text lower-case first.
        clean: How text is cleaned before the vocabulary is applied, by the name of the family
            that does it: see vlm/inputs/cleaning.py.
        keep_eos: Let a text that is too long still end with its end token.
        pad_side: Side of the text on which padding stands.
        parse_special: Read a special token that is spelled out in a text, such as <eos>, as
            that token, as transformers does.
        zeroed_id: Token that becomes 0 wherever it stands in a row, as with strip_sep_token of
            open_clip. None: there is none.

    Example:
        >>> vlm.TokenizerConfig(context_length=77, clean="clip").context_length
        77
    """

    context_length: int = 64
    pad_id: int = 0
    bos_id: int | None = None
    eos_id: int | None = 1
    lowercase: bool = False
    clean: Clean = "none"
    keep_eos: bool = True
    pad_side: Literal["right", "left"] = "right"
    parse_special: bool = False
    zeroed_id: int | None = None
