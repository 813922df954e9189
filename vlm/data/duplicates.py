"""Detection of duplicate images, also re-encoded or resized, by thumbnails of 16 x 16 pixels.

Two images are duplicates if their thumbnails differ by at most NEAR times their contrast.
`python tests/data/copies.py` measures how many re-encoded and resized copies that finds, and its
false positives. Drawings from one template, such as clock faces, are among these. As one group they
stay on one side of a split, which is the safe error.

The hash in `vlm.data.dataset_stats` compares for equality, so that one pass over a stream suffices;
it misses copies that differ in one bit.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from vlm.inputs.opening import open_image

SIDE = 16
NEAR = 0.1  # RMS difference, relative to the standard deviation of the pixels
ROWS = 512  # thumbnails per block of comparisons

Thumbnails = UInt8[np.ndarray, "_ k"]


def thumbnails(images: Sequence[Any]) -> Thumbnails:
    """Make the 16 x 16 thumbnail of each image, as a row; DataError if one cannot be read."""

    def small(image: Any) -> np.ndarray:
        opened = open_image(image, smallest=lambda width, height: (4 * SIDE, 4 * SIDE))
        return np.asarray(opened.resize((SIDE, SIDE), Image.Resampling.BILINEAR)).reshape(-1)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "vlm-decode") as pool:
        rows = list(pool.map(small, images))
    return np.stack(rows) if rows else np.zeros((0, 3 * SIDE * SIDE), np.uint8)


def copy_groups(shown: Thumbnails) -> Int[np.ndarray, " _"]:
    """Group duplicates (transitively); return the group number of each image."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(shown):
        return np.zeros(0, np.int64)
    distinct, owner = np.unique(shown, axis=0, return_inverse=True)
    first, second = _near_pairs(distinct)
    edges = (np.ones(len(first), bool), (first, second))
    graph = coo_array(edges, shape=(len(distinct),) * 2)
    return connected_components(graph, directed=False)[1][owner.reshape(-1)].astype(np.int64)


def copied_from(shown: Thumbnails, reference: Thumbnails) -> Bool[np.ndarray, " _"]:
    """Return a mask of the images that duplicate an image of `reference`."""
    if not len(shown) or not len(reference):
        return np.zeros(len(shown), bool)
    groups = copy_groups(np.concatenate([reference, shown]))
    return np.isin(groups[len(reference) :], groups[: len(reference)])


def _near_pairs(shown: Thumbnails) -> tuple[np.ndarray, np.ndarray]:
    """Find pairs of rows that are near duplicates.

    Rows are sorted by their means. Two rows differ by at least the difference of their means, so
    each row is compared only with a range of later rows.
    """
    z = shown.astype(np.float32) - np.float32(127.5)
    mean = z.mean(1)
    contrast = np.sqrt(z.reshape(len(z), -1, 3).var(1).mean(1))  # 0 for a single colour
    order = np.argsort(mean, kind="stable")
    z, mean, contrast = z[order], mean[order], contrast[order]
    squares, width = (z * z).sum(1), z.shape[1]
    reach = NEAR * float(contrast.max(initial=0.0))
    found: list[np.ndarray] = [np.zeros((0, 2), np.int64)]
    for start in range(0, len(z), ROWS):
        end = min(start + ROWS, len(z))
        last = int(np.searchsorted(mean, mean[end - 1] + reach, "right"))
        distance = squares[start:end, None] + squares[None, start:last]
        distance -= 2 * z[start:end] @ z[start:last].T
        limit = NEAR * np.maximum(contrast[start:end, None], contrast[None, start:last])
        rows, columns = np.nonzero(distance <= width * limit**2)
        found.append(np.stack([rows, columns], 1)[rows < columns] + start)
    pairs = order[np.concatenate(found)]
    return pairs[:, 0], pairs[:, 1]
