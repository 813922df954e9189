"""The map of a set: each image a point, and near ones alike."""

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from vlm import display
from vlm.errors import ConfigError, DataError
from vlm.inputs.opening import open_image
from vlm.paths import as_path

PAGE, EDGE = (250, 250, 252), 12  # background; pixels around the map


@dataclass(frozen=True, repr=False)
class EmbeddingMap:
    """Images at points of a plane.

    Attributes:
        points: (n, 2), from 0 to 1; x to the right, y downwards.
        explained: the share of the embeddings' variance that the two axes hold; None for a
            projection that was given.
        images: the n images.

    Example:
        >>> from vlm.explain import embedding_map
        >>> found = embedding_map(model.encode_image(pictures), pictures)
        >>> len(found.images)
        3
    """

    points: Float[np.ndarray, "n 2"]
    explained: float | None
    images: tuple[Any, ...] = field(compare=False)

    def picture(self, size: int = 900, thumbnail: int = 56) -> Image.Image:
        """The map as a square picture: thumbnails where there is room, and dots elsewhere."""
        sheet = Image.new("RGB", (size, size), PAGE)
        draw = ImageDraw.Draw(sheet)
        places = self._places(size, thumbnail)
        for x, y in places:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=display.COLOURS[0])
        for i in self._with_room(places, thumbnail):
            small = _small(self.images[i], thumbnail)
            x, y = (round(v) for v in places[i])
            sheet.paste(small, (x - small.width // 2, y - small.height // 2))
        return sheet

    def svg(self, size: int = 900, thumbnail: int = 56) -> str:
        """The same as SVG, with the thumbnails inside; a dot tells its number on hover."""
        places = self._places(size, thumbnail)
        fill = "rgb({},{},{})".format(*display.COLOURS[0])
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" '
            f'width="{size}" role="img" aria-label="map of {len(places)} images">'
        ]
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{fill}"><title>{i}</title></circle>'
            for i, (x, y) in enumerate(places)
        ]
        for i in self._with_room(places, thumbnail):
            small, (x, y) = _small(self.images[i], thumbnail), places[i]
            out = io.BytesIO()
            small.save(out, "PNG")
            address = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
            parts.append(
                f'<image href="{address}" x="{x - small.width / 2:.1f}" '
                f'y="{y - small.height / 2:.1f}" width="{small.width}" height="{small.height}">'
                f"<title>{i}</title></image>"
            )
        return "".join([*parts, "</svg>"])

    def save(self, file: str | os.PathLike) -> None:
        """Write the map as the file's ending says, .svg or .png.

        Raises:
            ConfigError: another ending.
        """
        name = os.fspath(file).lower()
        if name.endswith(".svg"):
            as_path(file).write_text(self.svg())
        elif name.endswith(".png"):
            with as_path(file).open("wb") as out:
                self.picture().save(out, "PNG")
        else:
            raise ConfigError(f"{os.fspath(file)!r} is neither .svg nor .png: name one of them")

    def __repr__(self) -> str:
        held = "" if self.explained is None else f", {self.explained:.0%} of the variance"
        return f"EmbeddingMap({len(self.points):,} images{held})"

    def _repr_html_(self) -> str:
        return self.svg()

    def _places(self, size: int, thumbnail: int) -> np.ndarray:
        edge = EDGE + thumbnail / 2
        return edge + self.points * (size - 2 * edge)

    def _with_room(self, places: np.ndarray, thumbnail: int) -> list[int]:
        """The images whose thumbnails overlap none before them."""
        chosen: list[int] = []
        for i, place in enumerate(places):
            if all(np.abs(place - places[j]).max() >= thumbnail for j in chosen):
                chosen.append(i)
        return chosen


def embedding_map(
    z_image: Float[np.ndarray, "n d"],
    images: Sequence[Any],
    *,
    projection: Float[np.ndarray, "n 2"] | None = None,
) -> EmbeddingMap:
    """The map of images by their embeddings; the same embeddings always give the same map.

    Args:
        z_image: what `model.encode_image(images)` gives.
        images: PIL images, paths or arrays, one for each row.
        projection: points of your own, such as UMAP or t-SNE made. None: the first two principal
            components, each turned so that its largest point is positive.

    Raises:
        DataError: fewer than two images, another number of images or of points, or numbers that
            are not finite.

    Example:
        >>> from vlm.explain import embedding_map
        >>> found = embedding_map(model.encode_image(pictures), pictures)
        >>> found.points.shape
        (3, 2)
    """
    z, images = np.asarray(z_image, np.float64), tuple(images)
    if z.ndim != 2 or len(z) < 2 or len(images) != len(z):
        raise DataError(
            f"{len(z)} embeddings and {len(images)} images: give one for each, and at least two"
        )
    explained = None
    if projection is None:
        _finite(z, "the embeddings")
        centred = z - z.mean(0)
        left, strength, _ = np.linalg.svd(centred, full_matrices=False)
        points = np.zeros((len(z), 2))
        count = min(2, len(strength))
        points[:, :count] = left[:, :count] * strength[:count]
        largest = np.abs(points).argmax(0)
        points *= np.where(points[largest, [0, 1]] < 0, -1, 1)
        explained = float((strength[:2] ** 2).sum() / max((strength**2).sum(), 1e-30))
    else:
        points = np.array(projection, np.float64)
        if points.shape != (len(z), 2):
            raise DataError(f"a projection of shape {points.shape}: give ({len(z)}, 2)")
        _finite(points, "the projection")
    low = points.min(0)
    points = (points - low) / max(float((points.max(0) - low).max()), 1e-30)
    points += (1 - points.max(0)) / 2  # the shorter side in the middle
    return EmbeddingMap(points, explained, images)


def _finite(values: np.ndarray, what: str) -> None:
    if not np.isfinite(values).all():
        raise DataError(f"{what} hold numbers that are not finite: leave those rows out")


def _small(image: Any, size: int) -> Image.Image:
    small = open_image(image)
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    return small
