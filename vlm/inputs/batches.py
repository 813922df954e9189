"""A stream of images as batches of pixels, decoded on threads ahead of what is asked for."""

import collections
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from PIL import Image

from vlm.errors import DataError
from vlm.inputs.opening import ImageLike, OnError, as_array, is_image
from vlm.inputs.preprocess import Preprocess
from vlm.nn.naflex import Patches


def pixel_batches(
    preprocess: Preprocess,
    images: Iterator[ImageLike],
    size: int,
    on_error: OnError | None = None,
) -> Iterator[np.ndarray | Patches]:
    """Batches of `size` images as uint8 pixels; no more than three batches are held.

    An image that cannot be read is told to `on_error`, in order, and left out.

    Raises:
        DataError: an image that cannot be read, and no `on_error`.
    """
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "vlm-decode")
    numbered = enumerate(images)
    window: collections.deque[tuple[int, Future]] = collections.deque()

    def submit(count: int) -> None:
        for number, image in itertools.islice(numbered, count):
            name = f"image {number}"
            try:
                held = _hold(preprocess, image, name)
                pixels = pool.submit(preprocess.pixels, held, name)
            except DataError as error:  # which has its turn, as those of the threads have
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


def _hold(preprocess: Preprocess, image: ImageLike, name: str) -> ImageLike:
    """The image as a thread may turn it into pixels while the caller goes on with it.

    A PIL image reads its file when it is first looked at, which two threads must not do at once,
    and is often a frame that gives way to the next; an array may be a buffer that is filled again.
    """
    if isinstance(image, Image.Image):
        opened = preprocess.open(image, name)
        return opened.copy() if opened is image else opened
    if is_image(image) and hasattr(image, "shape"):
        return as_array(image, name).copy()
    return image
