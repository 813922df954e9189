"""Near duplicates by the embeddings of a model, as in SSCD (Pizzi et al., 2022, arXiv:2202.10261).

`vlm.data.prepare` compares each image with all earlier ones. Neighbours are found by the exact
search of indexes, in blocks, so memory is that of the embeddings: 2 bytes per dimension and image,
and half as much again for the bounds that prune the search.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vlm.bundle import Bundle
from vlm.errors import ConfigError
from vlm.heads.pruned_search import TILE, Bounds
from vlm.heads.top_k import top_k


class ImageEmbedder:
    """Embeddings of images in batches of one size, so that a batch has the same values each time.

    Args:
        model: embeds the images.
        least: cosine from which two images are near duplicates.
        batch_size: images embedded at once.

    Raises:
        ConfigError: a cosine outside of 0 to 0.999, or a model without a vision tower.
    """

    def __init__(self, model: Bundle, least: float, batch_size: int = 32):
        if not 0 < least <= 0.999:
            raise ConfigError(
                f"max_similarity {least} is out of range: give a cosine above 0 and up to 0.999, "
                "such as 0.95"
            )
        if model.model.vision is None:
            raise ConfigError(f"{model.name} has no vision tower: name a model with one")
        self._model, self._least, self.batch_size = model, least, batch_size
        self.identity = model.identity

    def pixels(self, image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
        """Return the input of the model for an image; thread-safe."""
        return self._model.preprocess.pixels(image)

    def embed(self, pixels: Sequence[np.ndarray]) -> list[bytes]:
        """Return the embeddings of at most `batch_size` images, as float16."""
        rows = [*pixels, *[pixels[-1]] * (self.batch_size - len(pixels))]
        z = self._model.encode_pixels(self._model.preprocess.collate(rows))[: len(pixels)]
        return [row.tobytes() for row in np.asarray(z, np.float16)]

    def index(self) -> "SimilarityIndex":
        """Return an empty index for embeddings of the model."""
        return SimilarityIndex(self._model.embed_dim, self._least)


class SimilarityIndex:
    """Embeddings of images, searched for one with a cosine of at least `least`."""

    name, kind = "embedding", "similar image"

    def __init__(self, width: int, least: float):
        self.size = 2 * width
        self._width, self._least = width, least
        self._blocks: list[np.ndarray] = []
        self._bounds: list[Bounds | None] = []
        self._last: list[bytes] = []  # rows of the block that is not full
        self._at: dict[bytes, int] = {}  # of the expected signatures, in their batch
        self._near = np.zeros(0, bool)

    def add(self, signature: bytes) -> None:
        self._last.append(signature)
        if len(self._last) == TILE:
            self._blocks.append(self._rows(self._last))
            self._bounds.append(Bounds(self._blocks[-1].astype(np.float32)))
            self._last = []
        if signature in self._at:
            self._near |= self._pairs[self._at[signature]]

    def has_near(self, signature: bytes) -> bool:
        if signature not in self._at:
            self.expect([signature])
        return bool(self._near[self._at[signature]])

    def expect(self, signatures: Sequence[bytes]) -> None:
        """Search for the neighbours of a batch at once, before `has_near` asks for each."""
        distinct = list(dict.fromkeys(signatures))
        self._at = {signature: i for i, signature in enumerate(distinct)}
        z = self._rows(distinct).astype(np.float32)
        blocks, bounds = [*self._blocks], [*self._bounds]
        if self._last:
            blocks.append(self._rows(self._last))
            bounds.append(None)
        found, _ = top_k(z, blocks, 1, min_score=self._least, bounds=bounds)
        self._near = np.array([len(rows) > 0 for rows in found], bool)
        self._pairs = z @ z.T >= self._least

    def _rows(self, signatures: Sequence[bytes]) -> Any:
        return np.frombuffer(b"".join(signatures), np.float16).reshape(-1, self._width)
