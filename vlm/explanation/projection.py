"""2-D map of image embeddings (PCA or a given projection), drawn with thumbnails."""

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from vlm import display
from vlm.errors import ConfigError, DataError
from vlm.inputs.opening import ImageLike, open_image
from vlm.paths import as_path

BACKGROUND, MARGIN = (250, 250, 252), 12  # colour; pixels around the map


@dataclass(frozen=True, repr=False)
class EmbeddingMap:
    """2-D map of images.

    Attributes:
        points: (n, 2), from 0 to 1; x to the right, y downwards.
        explained: fraction of the variance explained by the two axes; None for a given projection.
        images: the n images.

    Example:
        >>> from vlm.explanation import embedding_map
        >>> result = embedding_map(model.encode_image(pictures), pictures)
        >>> len(result.images)
        3
    """

    points: Float[np.ndarray, "n 2"]
    explained: float | None
    images: tuple[ImageLike, ...] = field(compare=False)

    def picture(self, size: int = 900, thumbnail: int = 56) -> Image.Image:
        """Draw the map as a square image, with thumbnails where they do not overlap, else dots."""
        sheet = Image.new("RGB", (size, size), BACKGROUND)
        draw = ImageDraw.Draw(sheet)
        positions = self._positions(size, thumbnail)
        for x, y in positions:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=display.COLOURS[0])
        for i in self._without_overlap(positions, thumbnail):
            small = _thumbnail(self.images[i], thumbnail)
            x, y = (round(v) for v in positions[i])
            sheet.paste(small, (x - small.width // 2, y - small.height // 2))
        return sheet

    def svg(self, size: int = 900, thumbnail: int = 56) -> str:
        """Draw the map as SVG with embedded thumbnails; hovering shows the image number."""
        positions = self._positions(size, thumbnail)
        fill = "rgb({},{},{})".format(*display.COLOURS[0])
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" '
            f'width="{size}" role="img" aria-label="map of {len(positions)} images">'
        ]
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{fill}"><title>{i}</title></circle>'
            for i, (x, y) in enumerate(positions)
        ]
        for i in self._without_overlap(positions, thumbnail):
            small, (x, y) = _thumbnail(self.images[i], thumbnail), positions[i]
            out = io.BytesIO()
            small.save(out, "PNG")
            url = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
            parts.append(
                f'<image href="{url}" x="{x - small.width / 2:.1f}" '
                f'y="{y - small.height / 2:.1f}" width="{small.width}" height="{small.height}">'
                f"<title>{i}</title></image>"
            )
        return "".join([*parts, "</svg>"])

    def save(self, file: str | os.PathLike) -> None:
        """Write the map as .svg or .png, by the extension of the file name.

        Raises:
            ConfigError: any other extension.
        """
        name = os.fspath(file).lower()
        if name.endswith(".svg"):
            as_path(file).write_text(self.svg())
        elif name.endswith(".png"):
            with as_path(file).open("wb") as out:
                self.picture().save(out, "PNG")
        else:
            raise ConfigError(
                f"{os.fspath(file)!r} is neither .svg nor .png: use one of these extensions"
            )

    def __repr__(self) -> str:
        variance = "" if self.explained is None else f", {self.explained:.0%} of the variance"
        return f"EmbeddingMap({len(self.points):,} images{variance})"

    def _repr_html_(self) -> str:
        return self.svg()

    def _positions(self, size: int, thumbnail: int) -> np.ndarray:
        margin = MARGIN + thumbnail / 2
        return margin + self.points * (size - 2 * margin)

    def _without_overlap(self, positions: np.ndarray, thumbnail: int) -> list[int]:
        """Return the images whose thumbnails do not overlap an earlier one."""
        chosen: list[int] = []
        for i, position in enumerate(positions):
            if all(np.abs(position - positions[j]).max() >= thumbnail for j in chosen):
                chosen.append(i)
        return chosen


def embedding_map(
    z_image: Float[np.ndarray, "n d"],
    images: Sequence[ImageLike],
    *,
    projection: Float[np.ndarray, "n 2"] | None = None,
) -> EmbeddingMap:
    """Make a 2-D map of images from their embeddings; it is deterministic.

    Args:
        z_image: embeddings from `model.encode_image(images)`.
        images: PIL images, paths or arrays, one for each row.
        projection: given points, such as from UMAP or t-SNE. None: the first two principal
            components, each with the sign that makes its largest coordinate positive.

    Raises:
        DataError: fewer than two images, mismatched numbers of images, embeddings or points, or
            numbers that are not finite.

    Example:
        >>> from vlm.explanation import embedding_map
        >>> result = embedding_map(model.encode_image(pictures), pictures)
        >>> result.points.shape
        (3, 2)
    """
    z, images = np.asarray(z_image, np.float64), tuple(images)
    if z.ndim != 2 or len(z) < 2 or len(images) != len(z):
        raise DataError(
            f"{len(z)} embeddings and {len(images)} images: give one for each, and at least two"
        )
    explained = None
    if projection is None:
        _check_finite(z, "the embeddings")
        centred = z - z.mean(0)
        left, singular, _ = np.linalg.svd(centred, full_matrices=False)
        points = np.zeros((len(z), 2))
        count = min(2, len(singular))
        points[:, :count] = left[:, :count] * singular[:count]
        largest = np.abs(points).argmax(0)
        points *= np.where(points[largest, [0, 1]] < 0, -1, 1)
        explained = float((singular[:2] ** 2).sum() / max((singular**2).sum(), 1e-30))
    else:
        points = np.array(projection, np.float64)
        if points.shape != (len(z), 2):
            raise DataError(f"the projection has shape {points.shape}: it must be ({len(z)}, 2)")
        _check_finite(points, "the points of the projection")
    low = points.min(0)
    points = (points - low) / max(float((points.max(0) - low).max()), 1e-30)
    points += (1 - points.max(0)) / 2  # centre the shorter side
    return EmbeddingMap(points, explained, images)


def _check_finite(values: np.ndarray, name: str) -> None:
    if not np.isfinite(values).all():
        raise DataError(f"{name} contain non-finite numbers: remove those rows")


def _thumbnail(image: ImageLike, size: int) -> Image.Image:
    small = open_image(image).copy()
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    return small
