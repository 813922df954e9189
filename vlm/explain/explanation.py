"""What in an image speaks for a text, and what in the text for the image."""

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from vlm import display
from vlm.config import VisionTowerConfig
from vlm.errors import ConfigError, DataError
from vlm.explain.geometry import grid, on_image
from vlm.explain.methods import METHODS, Method, place_maps
from vlm.explain.picture import overlay
from vlm.explain.words import token_importance
from vlm.inputs.opening import ImageLike, is_image
from vlm.paths import as_path


@dataclass(frozen=True, repr=False)
class Explanation:
    """Why an image and a text are alike.

    Attributes:
        text: the text.
        heat: (h, w) float32 in the image's own pixels, from 0 (nothing here speaks for the text) to
            1 (the most); 0 where the model was not shown the image, beside a crop.
        places: (rows, columns), what the method gives for the places that the tower sees. By
            "path" it is what a place adds to the cosine over a blank image, and may be negative.
        tokens: each token of the text with how much the cosine falls where it is left out.
        cosine: of the two embeddings.
        logit: scale * cosine + bias, by the model's scale and bias.
        method: how the heat was found; see `explain`.
        image: the image as it was opened.

    Example:
        >>> found = vlm.explain(model, pictures[0], "a red square")
        >>> found.text
        'a red square'
    """

    text: str
    heat: Float[np.ndarray, "h w"]
    places: Float[np.ndarray, "rows columns"]
    tokens: tuple[tuple[str, float], ...]
    cosine: float
    logit: float
    method: str
    image: Image.Image = field(compare=False)

    def picture(self) -> Image.Image:
        """The image under its heat, of the image's size."""
        return overlay(self.image, self.heat)

    def show(self) -> None:
        """Open the picture in the system's viewer."""
        self.picture().show(self.text)

    def save(self, file: str | os.PathLike) -> None:
        """Write the picture as a PNG."""
        with as_path(file).open("wb") as out:
            self.picture().save(out, "PNG")

    def __repr__(self) -> str:
        words = ", ".join(f"{token} {fall:+.3f}" for token, fall in self.tokens)
        return f"Explanation({self.text!r}: cosine {self.cosine:.3f}; {words}; by {self.method})"

    def _repr_html_(self) -> str:
        most = max((abs(fall) for _, fall in self.tokens), default=0.0)
        words = display.bars(self.tokens, most)
        head = f"<b>{display.escape(self.text)}</b><br>cosine {self.cosine:.3f}, by {self.method}"
        pictures = display.thumbnail(self.image, 224) + display.thumbnail(self.picture(), 224)
        return display.card(pictures, f"<p>{head}</p>{words}")


def explain(model: Any, image: ImageLike, text: str, *, method: Method = "path") -> Explanation:
    """Explain the likeness of one image and one text by any model that `vlm.load` gives.

    Args:
        model: what `vlm.load` gives, with both towers.
        image: a PIL image, a path, the bytes of a file or an array of pixels.
        text: what is looked for.
        method: "path", what a place adds to the cosine on the way from a blank image to this one
            (integrated gradients, arXiv:1703.01365), which did best by deletion and insertion for
            the tower that was measured (`python tests/explain/curves.py`); "attention", what more
            attention to a place would add (LeGrad, arXiv:2404.03214); "similarity", the cosine of
            each place's own embedding (MaskCLIP, arXiv:2112.01071); "gradcam" (arXiv:1610.02391).

    Raises:
        ConfigError: an unknown method, one that needs attention of a tower that has none, or a
            model without one of its towers.
        DataError: the image cannot be read, or the text is no string.

    Example:
        >>> vlm.explain(model, "park.jpg", "a dog").save("dog.png")  # doctest: +SKIP
    """
    if not isinstance(text, str):
        raise DataError(f"the text to explain is a {type(text).__name__}: give one string")
    if not is_image(image):
        raise DataError(f"one image is explained at a time, not a {type(image).__name__}")
    tower = model.config.vision
    check_method(method, tower)
    opened = model.preprocess.open(image)
    z_text, z_image = model.encode_text([text]), model.encode_image([opened])
    pixels = model.preprocess.pixels(opened)
    maps, cosines = place_maps(
        model.model, model.preprocess.normalize(model.preprocess.collate([pixels])), z_text, method
    )
    rows, columns = grid(tower, model.preprocess, opened.size)
    places = np.asarray(maps[0])[: rows * columns].reshape(rows, columns)
    cosine = float(cosines[0])
    return Explanation(
        text=text,
        heat=on_image(warmth(places, method), model.preprocess, tower.patch_size, opened.size),
        places=places,
        tokens=token_importance(model, text, z_image[0]),
        cosine=cosine,
        logit=model.logit_scale * cosine + model.logit_bias,
        method=method,
        image=opened,
    )


def check_method(method: str, tower: VisionTowerConfig) -> None:
    """Refuse a method that there is not, or not for this tower.

    Raises:
        ConfigError: with those that there are.
    """
    if method not in METHODS:
        raise ConfigError(f"method {method!r} is not known: choose one of {', '.join(METHODS)}")
    if method == "attention" and not tower.attends:
        raise ConfigError(
            'method "attention" needs a tower of attention, and one of kind '
            f'"{tower.kind}" mixes places by convolutions: choose "path"'
        )


def warmth(places: Float[np.ndarray, "p q"], method: Method) -> Float[np.ndarray, "p q"]:
    """From 0 to 1, the largest being 1: what is negative speaks for nothing.

    Similarities differ little from place to place, and so are counted from the smallest.
    """
    places = places - places.min() if method == "similarity" else np.maximum(places, 0)
    return (places / max(float(places.max()), 1e-30)).astype(np.float32)
