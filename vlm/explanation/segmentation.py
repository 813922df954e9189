"""Zero-shot segmentation: assign each image position to its most similar label."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from vlm import display
from vlm._deprecation import rename_arguments
from vlm.bundle import Bundle
from vlm.errors import DataError
from vlm.explanation.geometry import check_positions, grid, on_image
from vlm.explanation.methods import dense_embeddings
from vlm.heads.zero_shot import ZeroShotClassifier, to_scores
from vlm.inputs.opening import ImageLike, is_image
from vlm.paths import as_path
from vlm.weights.instantiate import check_images


@dataclass(frozen=True, repr=False)
class Segmentation:
    """Segmentation of an image by labels.

    Attributes:
        labels: the m labels, in the order of the scores; the last may be "none of these".
        scores: (m, h, w) float32 at the resolution of the image: probability of each label.
        mask: (h, w), index of the best label; -1 outside the crop that the model sees.
        image: the decoded image.

    Example:
        >>> from vlm.explanation import segment
        >>> result = segment(model, pictures[0], ["red", "green"])
        >>> result.labels
        ('red', 'green')
    """

    labels: tuple[str, ...]
    scores: Float[np.ndarray, "m h w"]
    mask: Int[np.ndarray, "h w"]
    image: Image.Image = field(compare=False)

    @property
    def shares(self) -> list[tuple[str, float]]:
        """Each label with its fraction of the pixels that the model sees."""
        visible = self.mask[self.mask >= 0]
        return [(label, float((visible == i).mean())) for i, label in enumerate(self.labels)]

    def picture(self) -> Image.Image:
        """Return the image with each label in a different colour."""
        palette = np.array(display.COLOURS, np.float32)
        colours = palette[self.mask % len(palette)]
        visible = (self.mask >= 0)[..., None]
        pixels = np.asarray(self.image, np.float32)
        mixed = np.where(visible, 0.45 * pixels + 0.55 * colours, 0.3 * pixels + 0.7 * 255)
        return Image.fromarray(mixed.astype(np.uint8))

    def save(self, file: str | os.PathLike) -> None:
        """Write the picture as a PNG."""
        with as_path(file).open("wb") as out:
            self.picture().save(out, "PNG")

    def __repr__(self) -> str:
        shares = ", ".join(f"{label} {share:.0%}" for label, share in self.shares)
        return f"Segmentation({self.image.width} x {self.image.height}: {shares})"

    def _repr_html_(self) -> str:
        lines = []
        for i, (label, share) in enumerate(self.shares):
            red, green, blue = display.COLOURS[i % len(display.COLOURS)]
            dot = f"width:12px;height:12px;border-radius:3px;background:rgb({red},{green},{blue})"
            lines.append(
                '<div style="display:flex;gap:8px;align-items:center">'
                f'<div style="{dot}"></div>{display.escape(label)} {share:.0%}</div>'
            )
        pictures = display.thumbnail(self.image, 224) + display.thumbnail(self.picture(), 224)
        return display.card(pictures, "".join(lines))


@rename_arguments(none="other_label")
def segment(
    model: Bundle,
    image: ImageLike,
    labels: Sequence[str] | Mapping[str, Any],
    templates: Sequence[str] | None = None,
    other_label: Sequence[str] | str | None = None,
) -> Segmentation:
    """Segment one image by text labels, without training (MaskCLIP, arXiv:2112.01071).

    Each position of the vision tower is classified by its own embedding. Scores are interpolated
    between the centres of the positions, so the resolution is that of the patches.

    Args:
        model: a model from `vlm.load`, with both towers.
        image: a PIL image, a path, the bytes of a file or an array of pixels.
        labels, templates, other_label: see `vlm.ZeroShotClassifier`; `other_label`, such as
            "a photo.", adds a label for regions that match no other label.

    Raises:
        ConfigError: see `vlm.ZeroShotClassifier`; or a model without its vision tower.
        DataError: the image cannot be read, or is not an image.

    Example:
        >>> vlm.explanation.segment(model, "park.jpg", ["dog", "grass", "sky"])  # doctest: +SKIP
    """
    if not is_image(image):
        raise DataError(
            f"segment takes one image, not a {type(image).__name__}: call it once per image"
        )
    check_images(model.model, model.name)
    check_positions(model.config.vision, "segment")
    classifier = ZeroShotClassifier(model, labels, templates, other_label)
    opened = model.preprocess.open(image)
    pixels = model.preprocess.pixels(opened)
    batch = model.preprocess.normalize(model.preprocess.collate([pixels]))
    rows, columns = grid(model.config.vision, model.preprocess, opened.size)
    z = np.asarray(dense_embeddings(model.model, batch))[0, : rows * columns]
    by_position = to_scores(classifier.logits(z), classifier.rule)
    patch_size = model.config.vision.patch_size
    scores = np.stack(
        [
            on_image(
                np.asarray(label_scores, np.float32),
                model.preprocess,
                patch_size,
                opened.size,
                outside=-1,
            )
            for label_scores in by_position.T.reshape(-1, rows, columns)
        ]
    )
    visible = scores.min(0) >= 0
    mask = np.where(visible, scores.argmax(0), -1)
    return Segmentation(classifier.labels, np.maximum(scores, 0), mask, opened)
