"""Image preprocessing of a model: decode, resize, crop and normalise."""

import dataclasses
from collections.abc import Iterable
from typing import Literal, overload

import numpy as np
from jaxtyping import Array, Float, Float32, UInt8
from PIL import Image

from vlm.config import PreprocessConfig
from vlm.errors import ConfigError, check_choice
from vlm.inputs import naflex
from vlm.inputs.opening import MAX_PIXELS, ImageLike, Smallest, one_or_many, open_image
from vlm.inputs.resizing import PILLOW_KERNELS, resize_scipy, resize_tensor, resize_tensorflow
from vlm.nn.naflex import Patches

MAX_WEIGHTS = 1 << 24  # of a matrix resize, and its pixels: half a GiB in total
Pixels = np.ndarray | Array


class Preprocess:
    """Image preprocessing of a model, as a callable.

    An image is a PIL image, a path (local or remote), the bytes of an image file, or a uint8 array
    of shape (h, w), (h, w, 1), (h, w, 3) or (h, w, 4). `max_pixels` and `max_bytes` bound what is
    decoded, and its memory: see `open_image`.

    Example:
        >>> from vlm.inputs import Preprocess
        >>> prepare = Preprocess(vlm.PreprocessConfig(image_size=32, resize="squash"))
        >>> np.shape(prepare(pictures)), str(prepare.pixels(pictures[0]).dtype)
        ((3, 32, 32, 3), 'uint8')
    """

    def __init__(
        self,
        config: PreprocessConfig,
        *,
        max_pixels: int = MAX_PIXELS,
        max_bytes: int | None = None,
    ):
        if config.short_side is not None and config.short_side < config.image_size:
            raise ConfigError(
                f"short_side {config.short_side} is smaller than the crop of image_size "
                f"{config.image_size}: make it at least as large"
            )
        if config.backend == "tensor" and config.kernel == "lanczos" and not config.antialias:
            raise ConfigError("the lanczos kernel needs antialias=True: set it, or choose bicubic")
        if config.backend == "tensorflow" and (config.kernel != "bilinear" or config.antialias):
            raise ConfigError(
                'the backend "tensorflow" has one form: set kernel="bilinear" and antialias=False'
            )
        if config.backend == "scipy" and (
            config.resize != "pad" or config.kernel != "bilinear" or any(config.pad_value)
        ):
            raise ConfigError(
                'the backend "scipy" has one form: set resize="pad", kernel="bilinear" and '
                "pad_value=(0, 0, 0)"
            )
        if config.resize == "pad" and config.backend not in ("pillow", "scipy"):
            raise ConfigError('resize "pad" needs the backend "pillow": set it, or choose squash')
        if config.resize == "naflex" and not (config.patch_size and config.max_patches):
            raise ConfigError('resize "naflex" needs patch_size and max_patches: set both')
        self.config = config
        self.max_pixels, self.max_bytes = max_pixels, max_bytes

    def at_length(self, patches: int | None) -> "Preprocess":
        """Return a NaFlex preprocessing to at most `patches` patches; None changes nothing."""
        if patches is None:
            return self
        config = dataclasses.replace(self.config, max_patches=patches)
        return Preprocess(config, max_pixels=self.max_pixels, max_bytes=self.max_bytes)

    def __call__(
        self, images: ImageLike | Iterable[ImageLike]
    ) -> Float32[np.ndarray, "n s s 3"] | Patches:
        """Normalised pixels of each image; one image counts as a list of one.

        Raises:
            DataError: a file is missing or unreadable, an image too large, an array of another
                shape or type; the message names it.
        """
        rows = [self.pixels(image, f"image {i}") for i, image in enumerate(one_or_many(images))]
        size = self.config.image_size
        if rows:
            return self.normalize(self.collate(rows))
        return self.normalize(np.zeros((0, size, size, 3), np.uint8))

    def collate(self, rows: list[np.ndarray]) -> np.ndarray | Patches:
        """Batch several results of `pixels`."""
        c = self.config
        if c.resize != "naflex":
            return np.stack(rows)
        assert c.patch_size is not None  # `__init__` has checked it
        return naflex.collate(rows, c.patch_size, c.image_size // c.patch_size, step=naflex.STEP)

    def blank(self, count: int) -> UInt8[np.ndarray, "n s s 3"] | Patches:
        """Make a batch of `count` blank images of a fixed shape, to be filled by `put`."""
        c = self.config
        if c.resize != "naflex":
            return np.zeros((count, c.image_size, c.image_size, 3), np.uint8)
        assert c.patch_size is not None  # `__init__` has checked both
        assert c.max_patches is not None
        return naflex.blank(count, c.max_patches, c.patch_size, c.image_size // c.patch_size)

    def put(
        self, batch: np.ndarray | Patches, row: int, pixels: UInt8[np.ndarray, "h w 3"]
    ) -> None:
        """Write a result of `pixels` into `row` of a batch of `blank`."""
        if isinstance(batch, Patches):
            naflex.put(batch, row, pixels)
        else:
            batch[row] = pixels

    @property
    def image_bytes(self) -> int:
        """Bytes of one image in a batch of `blank`."""
        one = self.blank(1)
        return sum(x.nbytes for x in (one if isinstance(one, Patches) else (one,)))

    def pixels(self, image: ImageLike, name: str = "the image") -> UInt8[np.ndarray, "h w 3"]:
        """Return the resized image, not normalised; errors call it `name` if it has no path."""
        config, opened = self.config, self._limit_length(self.open(image, name))
        (width, height), box = self.layout(*opened.size)
        if config.backend == "scipy":
            return resize_scipy(np.asarray(opened), config.image_size)
        if config.backend != "pillow":
            array = np.asarray(opened)
            if config.backend == "tensorflow":
                array = resize_tensorflow(array, height, width)
            else:
                array = resize_tensor(
                    array, height, width, config.kernel, antialias=config.antialias
                )
            left, top, right, bottom = box or (0, 0, width, height)
            return array[top:bottom, left:right]
        if opened.size != (width, height):
            opened = opened.resize((width, height), PILLOW_KERNELS[config.kernel])
        if config.resize == "pad":
            canvas = Image.new("RGB", (config.image_size, config.image_size), config.pad_value)
            canvas.paste(opened, box)
            opened, box = canvas, None
        return np.array(opened if box is None else opened.crop(box))

    @overload
    def normalize(self, pixels: Patches) -> Patches: ...
    @overload
    def normalize(self, pixels: UInt8[Array, "*n 3"] | Float[Array, "*n 3"]) -> Array: ...
    @overload
    def normalize(self, pixels: np.ndarray) -> np.ndarray: ...
    def normalize(
        self, pixels: UInt8[Pixels, "*n 3"] | Float[Pixels, "*n 3"] | Patches
    ) -> Float32[Pixels, "*n 3"] | Patches:
        """Return `(pixels / 255 - mean) / std` of values in 0..255; NumPy or JAX, also in `jit`."""
        if isinstance(pixels, Patches):
            return pixels._replace(pixels=self.normalize(pixels.pixels))
        mean = np.asarray(self.config.mean, np.float32)
        std = np.asarray(self.config.std, np.float32)
        # In torchvision's order, so that float32 results are the same bit for bit.
        return (pixels.astype(np.float32) / np.float32(255) - mean) / std

    def open(
        self, image: ImageLike, name: str = "the image", smallest: Smallest | None = None
    ) -> Image.Image:
        """Open an image in mode RGB according to `config.decode`: see `open_image`."""
        return open_image(
            image,
            background=self.config.background,
            decode=self.config.decode,
            max_pixels=self.max_pixels,
            max_bytes=self.max_bytes,
            name=name,
            smallest=smallest,
        )

    def _limit_length(self, image: Image.Image) -> Image.Image:
        """Shorten the long side of an image if resizing it would not fit in memory.

        For a crop, both ends are cut equally, which keeps the centre; else the long side is
        averaged. Both differ slightly from the reference, which runs out of memory.
        """
        (width, height), _ = self.layout(*image.size)
        between = image.height * width  # the columns are resized first
        if self.config.backend == "pillow":
            limit, largest = self.max_pixels, max(between, width * height)
        else:
            weights = max(image.width * width, image.height * height)
            limit, largest = MAX_WEIGHTS, max(between, width * height, weights)
        if largest <= limit:
            return image
        long, short = max(image.size), min(image.size)
        if self.config.resize == "crop":
            cut = max(0, long - 3 * short - 64) // 2
            left, top = (cut, 0) if image.width == long else (0, cut)
            return image.crop((left, top, image.width - left, image.height - top))
        factor = -(-largest // limit)
        return image.reduce((factor, 1) if image.width == long else (1, factor))

    def layout(self, width: int, height: int):
        """Return the size to resize to, and the box to crop (or, when padding, to paste into)."""
        config = self.config
        if config.resize == "naflex":
            patch_size, max_patches = config.patch_size, config.max_patches
            assert patch_size is not None  # `__init__` has checked both
            assert max_patches is not None
            height, width = naflex.target_size(height, width, patch_size, max_patches)
            return (width, height), None
        short = config.short_side or config.image_size
        if config.resize == "squash" and short == config.image_size:
            return (short, short), None
        if config.resize == "pad":  # open_clip's ResizeKeepRatio and CenterCropOrPad
            ratio = max(width, height) / config.image_size
            size = tuple(max(1, round(side / ratio)) for side in (width, height))
            middle = config.backend != "scipy"  # which pads at the right and bottom alone
            left, top = ((config.image_size - side) // 2 * middle for side in size)
            return size, (left, top, left + size[0], top + size[1])
        # torchvision truncates the long side: int(short * long / short_now).
        if config.resize == "squash":
            size = (short, short)
        elif width <= height:
            size = (short, int(short * height / width))
        else:
            size = (int(short * width / height), short)
        margins = [(side - config.image_size) / 2 for side in size]
        left, top = (round(m) if config.crop_rounding == "round" else int(m) for m in margins)
        return size, (left, top, left + config.image_size, top + config.image_size)


def with_options(
    config: PreprocessConfig,
    resize_backend: Literal["pillow", "tensor", "tensorflow"] | None = None,
    decode: Literal["intended", "reference"] | None = None,
) -> PreprocessConfig:
    """Return the config with another resize backend or decoding; None keeps its own.

    Raises:
        ConfigError: an unknown value, or one that this preprocessing does not allow.
    """
    if decode is not None:
        check_choice("decode", decode, ("intended", "reference"))
        config = dataclasses.replace(config, decode=decode)
    if resize_backend is None or resize_backend == config.backend:
        return config
    check_choice("resize_backend", resize_backend, ("pillow", "tensor", "tensorflow"))
    if config.backend == "scipy":
        raise ConfigError(
            f"resize_backend {resize_backend!r}: this model's preprocessing, OWLv2's, has the "
            'backend "scipy" alone: leave resize_backend out'
        )
    own = resize_backend != "tensorflow"  # of which there is only one form
    kernel = config.kernel if own else "bilinear"
    return dataclasses.replace(config, backend=resize_backend, antialias=own, kernel=kernel)
