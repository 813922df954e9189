"""Explanation of one image-text pair: relevance of image regions and of text tokens."""

import os
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from vlm import display
from vlm._deprecation import warn
from vlm.bundle import Bundle
from vlm.config import VisionTowerConfig
from vlm.errors import ConfigError, DataError
from vlm.explanation.geometry import check_positions, grid, on_image
from vlm.explanation.methods import METHODS, Method, relevance_maps
from vlm.inputs.opening import ImageLike, is_image
from vlm.paths import as_path

# Colour map from dark violet over red to pale yellow, as RGB at equal steps. Lightness rises
# monotonically, so it is readable in greyscale and for colour-blind readers.
_SCALE = np.array(
    [(20, 14, 54), (84, 15, 109), (158, 40, 100), (219, 80, 59), (249, 142, 8), (252, 255, 164)],
    np.float32,
)


@dataclass(frozen=True, repr=False)
class Explanation:
    """Explanation of the similarity of an image and a text.

    Attributes:
        text: the text.
        heat: (h, w) float32 at the resolution of the image: relevance to the text from 0 to 1
            (maximum). 0 outside the crop that the model sees.
        relevance: (rows, columns), unscaled relevance of each position of the tower's grid. For
            "path": contribution to the cosine relative to a blank image; it may be negative.
        tokens: each token of the text, with the drop of the cosine without it.
        cosine: cosine similarity of the two embeddings.
        logit: scale * cosine + bias, with the model's scale and bias.
        method: relevance method; see `explain`.
        image: the decoded image.

    Example:
        >>> result = vlm.explain(model, pictures[0], "a red square")
        >>> result.text
        'a red square'
    """

    text: str
    heat: Float[np.ndarray, "h w"]
    relevance: Float[np.ndarray, "rows columns"]
    tokens: tuple[tuple[str, float], ...]
    cosine: float
    logit: float
    method: str
    image: Image.Image = field(compare=False)

    @property
    def places(self) -> Float[np.ndarray, "rows columns"]:
        """Deprecated: `relevance`."""
        warn("Explanation.places", "Explanation.relevance", stacklevel=3)
        return self.relevance

    def picture(self) -> Image.Image:
        """Return the image with the heat map over it, at the image's size."""
        return overlay(self.image, self.heat)

    def show(self) -> None:
        """Open the picture in the system's image viewer."""
        self.picture().show(self.text)

    def save(self, file: str | os.PathLike) -> None:
        """Write the picture as a PNG."""
        with as_path(file).open("wb") as out:
            self.picture().save(out, "PNG")

    def __repr__(self) -> str:
        tokens = ", ".join(f"{token} {drop:+.3f}" for token, drop in self.tokens)
        return f"Explanation({self.text!r}: cosine {self.cosine:.3f}; {tokens}; by {self.method})"

    def _repr_html_(self) -> str:
        largest = max((abs(drop) for _, drop in self.tokens), default=0.0)
        bars = display.bars(self.tokens, largest)
        head = f"<b>{display.escape(self.text)}</b><br>cosine {self.cosine:.3f}, by {self.method}"
        pictures = display.thumbnail(self.image, 224) + display.thumbnail(self.picture(), 224)
        return display.card(pictures, f"<p>{head}</p>{bars}")


def explain(model: Bundle, image: ImageLike, text: str, *, method: Method = "path") -> Explanation:
    """Explain the similarity of one image and one text by a heat map and token importances.

    Args:
        model: a model from `vlm.load`, with both towers.
        image: a PIL image, a path, the bytes of a file or an array of pixels.
        text: the text to explain.
        method: "path": contribution of each position to the cosine along the path from a blank
            image (integrated gradients, arXiv:1703.01365); the best by deletion and insertion
            on the towers of `python tests/explanation/curves.py`. "attention": gradient of the
            cosine by the attention weights (LeGrad, arXiv:2404.03214). "similarity": cosine of each
            position's own embedding (MaskCLIP, arXiv:2112.01071). "gradcam": arXiv:1610.02391.

    Raises:
        ConfigError: an unknown method, a method that the tower does not support, or a model with
            only one tower.
        DataError: the image cannot be read, or the text is not a string.

    Example:
        >>> vlm.explain(model, "park.jpg", "a dog").save("dog.png")  # doctest: +SKIP
    """
    if not isinstance(text, str):
        raise DataError(f"the text to explain is a {type(text).__name__}: give one string")
    if not is_image(image):
        raise DataError(
            f"explain takes one image, not a {type(image).__name__}: call it once per image"
        )
    tower = model.config.vision
    check_method(method, tower)
    opened = model.preprocess.open(image)
    z_text, z_image = model.encode_text([text]), model.encode_image([opened])
    pixels = model.preprocess.pixels(opened)
    maps, cosines = relevance_maps(
        model.model, model.preprocess.normalize(model.preprocess.collate([pixels])), z_text, method
    )
    rows, columns = grid(tower, model.preprocess, opened.size)
    relevance = np.asarray(maps[0])[: rows * columns].reshape(rows, columns)
    cosine = float(cosines[0])
    return Explanation(
        text=text,
        heat=on_image(
            normalize_relevance(relevance, method), model.preprocess, tower.patch_size, opened.size
        ),
        relevance=relevance,
        tokens=token_importance(model, text, z_image[0]),
        cosine=cosine,
        logit=model.logit_scale * cosine + model.logit_bias,
        method=method,
        image=opened,
    )


def check_method(method: str, tower: VisionTowerConfig) -> None:
    """Check that a method exists and that the tower supports it.

    Raises:
        ConfigError: it does not; the message names the methods to choose from.
    """
    if method not in METHODS:
        raise ConfigError(f"there is no method {method!r}: choose one of {', '.join(METHODS)}")
    check_positions(tower, "explain")
    if method == "attention" and not tower.attends:
        raise ConfigError(
            'method "attention" needs a tower with attention layers, but kind '
            f'"{tower.kind}" is convolutional: choose "path"'
        )


def normalize_relevance(
    relevance: Float[np.ndarray, "p q"], method: Method
) -> Float[np.ndarray, "p q"]:
    """Scale relevance to 0 to 1, with the maximum at 1; negative values become 0.

    Similarities vary little between positions, so their minimum is subtracted.
    """
    relevance = relevance - relevance.min() if method == "similarity" else np.maximum(relevance, 0)
    return (relevance / max(float(relevance.max()), 1e-30)).astype(np.float32)


def colours(values: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Map values from 0 to 1 to colours, from dark to bright."""
    at = np.clip(values, 0, 1) * (len(_SCALE) - 1)
    low = np.minimum(at.astype(int), len(_SCALE) - 2)
    fraction = (at - low)[..., None]
    return (_SCALE[low] * (1 - fraction) + _SCALE[low + 1] * fraction + 0.5).astype(np.uint8)


def overlay(image: Image.Image, heat: Float[np.ndarray, "h w"]) -> Image.Image:
    """Overlay a heat map on a greyscale image; the square root makes low values visible."""
    grey = 255 * 0.4 + 0.6 * np.asarray(image.convert("L"), np.float32)[..., None]
    visible = np.sqrt(np.clip(heat, 0, 1))
    strength = 0.85 * visible[..., None]
    mixed = grey * (1 - strength) + colours(0.25 + 0.75 * visible) * strength
    return Image.fromarray(mixed.astype(np.uint8))


def token_importance(
    model: Bundle, text: str, z_image: Float[np.ndarray, " d"]
) -> tuple[tuple[str, float], ...]:
    """Compute the drop of the cosine with `z_image` without each token of `text`.

    A negative number means that the text matches better without the token (erasure, Li et al.,
    2016, arXiv:1612.08220). It works for every text tower.
    """
    config = model.tokenizer.config
    (row,) = model.tokenizer([text])
    specials = {config.pad_id, config.bos_id, config.eos_id}
    positions = [i for i, token in enumerate(row.tolist()) if token not in specials]
    rows = [row]
    for i in positions:
        rest, pad = np.delete(row, i), [config.pad_id]
        rows.append(np.concatenate([rest, pad] if config.pad_side == "right" else [pad, rest]))
    cosines = model.encode_tokens(np.stack(rows).astype(np.int32)) @ z_image
    names = [model.tokenizer.decode([row[i : i + 1]])[0] for i in positions]
    drops = cosines[0] - cosines[1:]
    return tuple((name, float(drop)) for name, drop in zip(names, drops, strict=True))
