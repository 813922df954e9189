"""Batches of pixels from a stream of images, decoded ahead on threads."""

import collections
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from PIL import Image

from vlm.errors import ConfigError, DataError
from vlm.inputs.opening import ImageLike, OnError, as_array, is_image
from vlm.inputs.preprocess import Preprocess
from vlm.nn.naflex import Patches


def batch_size_of(batch_size: int | None) -> int:
    """Return a batch size, checked; the default is 32 on CPU, else 256."""
    if batch_size is None:
        return 32 if jax.default_backend() == "cpu" else 256
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size} is too small: give at least 1")
    return batch_size


def pixel_batches(
    preprocess: Preprocess, images: Iterator[ImageLike], size: int, on_error: OnError | None = None
) -> Iterator[np.ndarray | Patches]:
    """Yield batches of `size` images as uint8 pixels; at most three batches are in memory.

    Unreadable images are passed to `on_error`, in order, and skipped. Without `on_error` they raise
    a DataError.
    """
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "vlm-decode")
    numbered = enumerate(images)
    window: collections.deque[tuple[int, Future]] = collections.deque()

    def submit(count: int) -> None:
        for number, image in itertools.islice(numbered, count):
            name = f"image {number}"
            try:
                image = _detach(preprocess, image, name)
                pixels = pool.submit(preprocess.pixels, image, name)
            except DataError as error:  # reported in order, like errors of the threads
                pixels = Future()
                pixels.set_exception(error)
            window.append((number, pixels))

    try:
        submit(2 * size)
        while window:
            rows = []
            while window and len(rows) < size:
                number, pixels = window.popleft()
                try:
                    rows.append(pixels.result())
                except DataError as error:
                    if on_error is None:
                        raise
                    on_error(number, error)
                submit(1)
            if rows:
                yield preprocess.collate(rows)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _detach(preprocess: Preprocess, image: ImageLike, name: str) -> ImageLike:
    """Copy an image where needed, so that a thread can decode it while the caller reuses it.

    A PIL image reads its file lazily, which is not thread-safe, and may be a video frame that the
    next one overwrites. An array may be a buffer that the caller refills.
    """
    if isinstance(image, Image.Image):
        opened = preprocess.open(image, name)
        return opened.copy() if opened is image else opened
    if is_image(image) and hasattr(image, "shape"):
        return as_array(image, name).copy()
    return image
