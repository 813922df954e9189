"""Configs of image preprocessing and tokenization."""

from dataclasses import dataclass
from typing import Literal

from vlm.config.base import Config
from vlm.errors import ConfigError, brief

# Mean of the training images of OpenAI's CLIP, by channel; most later models use it too.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
# Standard deviation of the training images of OpenAI's CLIP, by channel.
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


# Rules that clean a text before it is tokenized.
Clean = Literal["none", "clip", "clip_cased", "clip_canonical", "siglip", "bert"]


@dataclass(frozen=True)
class PreprocessConfig(Config):
    """Image preprocessing of a model.

    Args:
        image_size: Side of the square input, in pixels; for naflex, of the grid of positions.
        resize: squash: resize both sides; crop: resize the short side, then crop the centre; pad:
            resize the long side, then pad with `pad_value`; naflex: any aspect ratio within
            `max_patches`.
        pad_value: Colour (red, green, blue) around an image that is padded.
        patch_size: For naflex: the model's patch size, in pixels.
        max_patches: For naflex: maximum number of patches; in training, the model's.
        kernel: Interpolation of the resize.
        backend: Implementation of the resize: pillow, as torchvision for PIL images; tensor, as
            torchvision for uint8 tensors; tensorflow, as big_vision; scipy, as OWLv2: pad at the
            right and bottom to a square, then blur and interpolate linearly.
        antialias: Antialiasing of the tensor backend when it shrinks an image; pillow always has
            it, tensorflow never.
        mean: Mean of red, green and blue to subtract, for values from 0 to 1.
        std: Standard deviation of red, green and blue to divide by.
        short_side: For crop: length of the short side before the crop, in pixels; for squash: of
            both sides before a centre crop (ALIGN). None: image_size.
        crop_rounding: Rounding of half an odd margin of the centre crop. round, as torchvision;
            floor, as transformers.
        background: Colour (red, green, blue) under transparent pixels. None: drop alpha.
        decode: Conversion of image files to RGB. intended: upright by its EXIF orientation, on
            `background` where transparent, 16 bits scaled to 8; reference: Pillow's
            Image.open(file).convert("RGB"), as for published figures.

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
    backend: Literal["pillow", "tensor", "tensorflow", "scipy"] = "pillow"
    antialias: bool = True
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    short_side: int | None = None
    crop_rounding: Literal["round", "floor"] = "round"
    background: tuple[int, int, int] | None = (255, 255, 255)
    decode: Literal["intended", "reference"] = "intended"


@dataclass(frozen=True)
class TokenizerConfig(Config):
    """Settings of a tokenizer, besides its `tokenizer.json`.

    Args:
        context_length: Number of tokens. Longer texts are truncated, and counted in the log.
        pad_id: Id of the padding token.
        bos_id: Id of the token before the text. None: no such token.
        eos_id: Id of the token after the text. None: no such token.
        lowercase: Convert the text to lower case first.
        clean: Text cleaning before tokenization, by model family: see vlm/inputs/cleaning.py.
        keep_eos: Keep the end token of a truncated text.
        pad_side: Side of the padding.
        parse_special: Convert special tokens in a text, such as <eos>, to their ids, as
            transformers does.
        zeroed_id: Id that is replaced by 0, as with open_clip's strip_sep_token. None: no such id.
        truncation_side: Side that a long text loses.
        prompts: Texts to put before a text, by name, such as {"query": "search_query: "}.
        default_prompt: Name of the prompt of every text that names no other. None: no prompt.
        prompt_required: The model was trained with a prompt before each text. Texts without one are
            warned of.

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
    truncation_side: Literal["right", "left"] = "right"
    prompts: tuple[tuple[str, str], ...] = ()
    default_prompt: str | None = None
    prompt_required: bool = False

    def check(self) -> None:
        self.prompt(self.default_prompt)

    def prompt(self, name: str | None) -> str:
        """Return the prompt called `name`; that of `default_prompt` for None, and none for "".

        Raises:
            ConfigError: there is no prompt of that name.

        Example:
            >>> vlm.TokenizerConfig(prompts={"query": "query: "}).prompt("query")
            'query: '
        """
        name = self.default_prompt if name is None else name
        known = dict(self.prompts)
        if name and name not in known:
            has = f"it has {', '.join(map(repr, known))}" if known else "the model has no prompts"
            raise ConfigError(f"prompt {brief(name)} is unknown: {has}")
        return known[name] if name else ""
