"""Images to pixels: careful opening, resizing as the reference code does, and normalisation.

Three backends resize. `pillow` is what torchvision and transformers do with PIL images; `tensor` is
what they do with uint8 tensors (transformers' default since version 5), and `tensorflow` is what
big_vision does, both in numpy to the same bits.
"""

import io
import math
import os
from collections.abc import Iterable

import numpy as np
from etils import epath
from jaxtyping import Array, Float, Float32, UInt8
from PIL import Image, ImageCms, ImageOps

from vlm.config import PreprocessConfig
from vlm.errors import ConfigError, DataError
from vlm.nn.naflex import Patches
from vlm.paths import as_path

ImageLike = Image.Image | str | os.PathLike | bytes | np.ndarray

MAX_PIXELS = 89_478_485  # a quarter of a GiB as RGB: where Pillow itself begins to warn

PILLOW_KERNELS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_ORIENTATION = 0x0112  # the EXIF tag
NAFLEX_STEP = 64  # patches: sequences are padded to a multiple, so that few shapes are compiled


class Preprocess:
    """What a model expects of its images, as a function.

    An image is a PIL image, a path (local or remote), the bytes of an image file, or a uint8 array
    of shape (h, w), (h, w, 1), (h, w, 3) or (h, w, 4). `max_pixels` bounds what is decoded.
    """

    def __init__(self, config: PreprocessConfig, *, max_pixels: int = MAX_PIXELS):
        if config.image_size < 1:
            raise ConfigError(f"image_size {config.image_size} has no pixels: make it at least 1")
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
        if config.resize == "pad" and config.backend != "pillow":
            raise ConfigError('resize "pad" needs the backend "pillow": set it, or choose squash')
        if config.resize == "naflex" and not (config.patch_size and config.max_patches):
            raise ConfigError('resize "naflex" needs patch_size and max_patches: set both')
        if min(config.std) <= 0:
            raise ConfigError(f"std {config.std} must be positive: pixels are divided by it")
        self.config = config
        self.max_pixels = max_pixels

    def __call__(
        self, images: ImageLike | Iterable[ImageLike]
    ) -> Float32[np.ndarray, "n s s 3"] | Patches:
        """Normalised pixels of each image; one image counts as a list of one.

        Raises:
            DataError: a file is missing or unreadable, an image too large, an array of another
                shape or type; the message names it.
        """
        images = [images] if _is_one(images) else images
        rows = [self.pixels(image, f"image {i}") for i, image in enumerate(images)]
        size = self.config.image_size
        if rows:
            return self.normalize(self.collate(rows))
        return self.normalize(np.zeros((0, size, size, 3), np.uint8))

    def collate(self, rows: list[np.ndarray]) -> np.ndarray | Patches:
        """What `pixels` made of several images, as one batch."""
        c = self.config
        if c.resize != "naflex":
            return np.stack(rows)
        return collate(rows, c.patch_size, c.image_size // c.patch_size, step=NAFLEX_STEP)

    def pixels(self, image: ImageLike, name: str = "the image") -> UInt8[np.ndarray, "s s 3"]:
        """The resized image before normalisation; `name` is what errors call it if it has none."""
        config, opened = self.config, self.open(image, name)
        (width, height), box = self._layout(*opened.size)
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
            canvas = Image.new("RGB", (config.image_size,) * 2, config.fill)
            canvas.paste(opened, box)
            opened, box = canvas, None
        return np.array(opened if box is None else opened.crop(box))

    def normalize(
        self, pixels: UInt8[Array, "*n 3"] | Float[Array, "*n 3"] | Patches
    ) -> Float32[Array, "*n 3"] | Patches:
        """`(pixels / 255 - mean) / std` for values in 0..255; numpy or jax, also inside `jit`."""
        if isinstance(pixels, Patches):
            return pixels._replace(pixels=self.normalize(pixels.pixels))
        mean = np.asarray(self.config.mean, np.float32)
        std = np.asarray(self.config.std, np.float32)
        # In torchvision's order, so that float32 results are the same bit for bit.
        return (pixels.astype(np.float32) / np.float32(255) - mean) / std

    def open(self, image: ImageLike, name: str = "the image") -> Image.Image:
        """The image in mode RGB, upright, on the background: see `open_image`."""
        return open_image(
            image, background=self.config.background, max_pixels=self.max_pixels, name=name
        )

    def _layout(self, width: int, height: int):
        """The size to resize to, and the box to crop from that, or to paste it into, or None."""
        config = self.config
        if config.resize == "naflex":
            height, width = target_size(height, width, config.patch_size, config.max_patches)
            return (width, height), None
        if config.resize == "squash":
            return (config.image_size, config.image_size), None
        if config.resize == "pad":  # open_clip's ResizeKeepRatio and CenterCropOrPad
            ratio = max(width, height) / config.image_size
            size = tuple(max(1, round(side / ratio)) for side in (width, height))
            left, top = ((config.image_size - side) // 2 for side in size)
            return size, (left, top, left + size[0], top + size[1])
        short = config.short_side or config.image_size
        # torchvision truncates the long side: int(short * long / short_now).
        if width <= height:
            size = (short, int(short * height / width))
        else:
            size = (int(short * width / height), short)
        margins = [(side - config.image_size) / 2 for side in size]
        left, top = (round(m) if config.crop_offset == "round" else int(m) for m in margins)
        return size, (left, top, left + config.image_size, top + config.image_size)


def open_image(
    image: ImageLike,
    *,
    background: tuple[int, int, int] | None = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
    name: str = "the image",
) -> Image.Image:
    """Any image in mode RGB, as its author meant it to look.

    EXIF orientation is applied, transparency lies on `background` (None drops the alpha channel),
    16-bit and float greyscale are scaled to 8 bits.

    Raises:
        DataError: missing, empty, unreadable, too large, or not an image; the message names it.
    """
    if isinstance(image, Image.Image):
        name = getattr(image, "filename", "") or name
    elif isinstance(image, str | os.PathLike):
        name = os.fspath(image)
        image = _opened(_read(as_path(image)), name, max_pixels)
    elif isinstance(image, bytes):
        image = _opened(image, name, max_pixels)
    else:
        image = _from_array(image, name)
    _check_size(image, name, max_pixels)
    try:
        return _to_rgb(_upright(image), background)
    except (OSError, ValueError, SyntaxError, EOFError, ImageCms.PyCMSError) as error:
        raise DataError(f"{name} cannot be decoded ({error}): replace or remove it") from None


def resize_tensor(
    array: UInt8[np.ndarray, "h w c"], height: int, width: int, kernel: str, *, antialias: bool
) -> UInt8[np.ndarray, "height width c"]:
    """Resize as PyTorch's `interpolate` does uint8 tensors: columns, then rows, rounded after each.

    Its weights are 16-bit integers with a common exponent, so it is neither Pillow nor exact.
    """
    if array.shape[1] != width:
        weights, bits = _fixed_point(resize_matrix(array.shape[1], width, kernel, antialias))
        array = _shift(np.einsum("xw,hwc->hxc", weights, array, optimize=True), bits)
    if array.shape[0] != height:
        weights, bits = _fixed_point(resize_matrix(array.shape[0], height, kernel, antialias))
        array = _shift(np.einsum("yh,hxc->yxc", weights, array, optimize=True), bits)
    return array


def resize_tensorflow(
    array: UInt8[np.ndarray, "h w c"], height: int, width: int
) -> UInt8[np.ndarray, "height width c"]:
    """Resize as big_vision does: TensorFlow's bilinear interpolation, cut to whole numbers.

    `tf.image.resize(image, size, "bilinear", antialias=False)` and a cast to uint8, in float32 and
    in its order, since the cast rounds nothing.
    """
    left, right, across = _neighbours(array.shape[1], width)
    top, bottom, down = _neighbours(array.shape[0], height)
    wide = array.astype(np.float32)
    wide = wide[:, left] + (wide[:, right] - wide[:, left]) * across[:, None]
    return (wide[top] + (wide[bottom] - wide[top]) * down[:, None, None]).astype(np.uint8)


def _neighbours(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two of `source` pixels around each of `target`, and how far it lies between them."""
    half, scale = np.float32(0.5), np.float32(source) / np.float32(target)
    at = (np.arange(target, dtype=np.float32) + half) * scale - half
    low = np.floor(at)
    before, after = np.maximum(low, 0), np.minimum(np.ceil(at), source - 1)
    return before.astype(int), after.astype(int), at - low


def _fixed_point(matrix: Float[np.ndarray, "n m"]) -> tuple[Float[np.ndarray, "n m"], int]:
    """Integer weights (as float64, whose products are exact and fast) and their exponent."""
    bits = 0
    while bits < 22 and int(0.5 + matrix.max() * 2 ** (bits + 1)) < 2**15:
        bits += 1
    return np.trunc(matrix * 2.0**bits + np.where(matrix < 0, -0.5, 0.5)), bits


def _shift(sums: Float[np.ndarray, "*n"], bits: int) -> UInt8[np.ndarray, "*n"]:
    return np.clip(np.floor((sums + 2.0 ** (bits - 1)) * 2.0**-bits), 0, 255).astype(np.uint8)


def resize_matrix(
    source: int, target: int, kernel: str, antialias: bool
) -> Float[np.ndarray, "target source"]:
    """The weights by which `source` pixels make `target`, as PyTorch's `interpolate` has them.

    Half-pixel centres (align_corners=False). With antialias the kernel widens when shrinking and
    bicubic has a = -0.5; without, a = -0.75 and the border pixel repeats.
    """
    scale = source / target
    if kernel == "nearest":
        taken = np.minimum((np.arange(target) * scale).astype(int), source - 1)
        return np.eye(source)[taken]
    center = (np.arange(target) + 0.5) * scale
    weights = np.zeros((target, source))
    if antialias:
        stretch = max(scale, 1.0)
        reach = _SUPPORT[kernel] * stretch
        for row, c in zip(weights, center, strict=True):
            first, last = max(int(c - reach + 0.5), 0), min(int(c + reach + 0.5), source)
            values = _kernel(kernel, (np.arange(first, last) - c + 0.5) / stretch, cubic=-0.5)
            row[first:last] = values / values.sum()
        return weights
    reach = _SUPPORT[kernel]
    for row, c in zip(weights, center - 0.5, strict=True):
        near = np.arange(int(np.floor(c)) - reach + 1, int(np.floor(c)) + reach + 1)
        np.add.at(row, np.clip(near, 0, source - 1), _kernel(kernel, near - c, cubic=-0.75))
    return weights


def target_size(height: int, width: int, patch_size: int, max_patches: int) -> tuple[int, int]:
    """NaFlex: height and width, multiples of the patch size, of the largest image in the budget.

    The bisection is that of the reference code (Hugging Face's `Siglip2ImageProcessor`), to the
    step: where it stops decides the size.
    """

    def scaled(scale: float, size: int) -> int:
        return max(patch_size, math.ceil(size * scale / patch_size) * patch_size)

    low, high, eps = 1e-6, 100.0, 1e-5
    while high - low >= eps:
        scale = (low + high) / 2
        count = (scaled(scale, height) / patch_size) * (scaled(scale, width) / patch_size)
        low, high = (scale, high) if count <= max_patches else (low, scale)
    return scaled(low, height), scaled(low, width)


def collate(images: list[np.ndarray], patch_size: int, grid: int, step: int) -> Patches:
    """Resized images, (h, w, 3) each, as one batch; its length is a multiple of `step` patches."""
    shapes = [(image.shape[0] // patch_size, image.shape[1] // patch_size) for image in images]
    length = -(-max(h * w for h, w in shapes) // step) * step
    pixels = np.zeros((len(images), length, patch_size**2, 3), images[0].dtype)
    rows = np.zeros((len(images), length, grid), np.float32)
    columns = np.zeros_like(rows)
    mask = np.zeros((len(images), length), bool)
    for i, (image, (h, w)) in enumerate(zip(images, shapes, strict=True)):
        cut = image.reshape(h, patch_size, w, patch_size, 3).transpose(0, 2, 1, 3, 4)
        pixels[i, : h * w] = cut.reshape(h * w, patch_size**2, 3)
        rows[i, : h * w] = np.repeat(resize_matrix(grid, h, "bilinear", True), w, axis=0)
        columns[i, : h * w] = np.tile(resize_matrix(grid, w, "bilinear", True), (h, 1))
        mask[i, : h * w] = True
    return Patches(pixels, rows, columns, mask)


_SUPPORT = {"bilinear": 1, "bicubic": 2, "lanczos": 3}


def _kernel(name: str, x: np.ndarray, cubic: float) -> np.ndarray:
    x = np.abs(x)
    if name == "bilinear":
        return np.maximum(1 - x, 0)
    if name == "lanczos":
        return np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0)
    near = ((cubic + 2) * x - (cubic + 3)) * x * x + 1  # Keys (1981)
    far = (((x - 5) * x + 8) * x - 4) * cubic
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _is_one(images) -> bool:
    if isinstance(images, Image.Image | str | os.PathLike | bytes):
        return True
    return hasattr(images, "shape") and len(images.shape) < 4


def _read(path: epath.Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"there is no image {path}: check the path") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, not an image: give the files inside it") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from None


def _opened(data: bytes, name: str, max_pixels: int) -> Image.Image:
    if not data:
        raise DataError(f"{name} is empty: replace or remove it")
    if max_pixels > (Image.MAX_IMAGE_PIXELS or max_pixels):
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's own limit, else lower than the one asked for
    try:
        return Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        raise DataError(_too_large(name, "too many", max_pixels)) from None
    except (OSError, ValueError, SyntaxError, EOFError):
        raise DataError(f"{name} is not an image that Pillow reads: replace or remove it") from None


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise DataError(_too_large(name, f"{pixels:,}", max_pixels))
    if pixels == 0:
        raise DataError(f"{name} has no pixels ({image.width}x{image.height}): remove it")


def _too_large(name: str, pixels: str, max_pixels: int) -> str:
    return (
        f"{name} has {pixels} pixels, over the limit of {max_pixels:,}: raise max_pixels if you "
        "trust it"
    )


def _from_array(image, name: str) -> Image.Image:
    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise DataError(
            f"{name} is an array of {array.dtype}, not uint8: scale it to 0..255 and convert it"
        )
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[-1] in (3, 4)):
        raise DataError(
            f"{name} has shape {array.shape}: give (height, width), or (height, width, channels) "
            "with 1, 3 or 4 channels"
        )
    if 0 in array.shape:
        raise DataError(f"{name} has no pixels (shape {array.shape}): remove it")
    return Image.fromarray(array)


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    except Exception:  # damaged metadata says nothing, and the pixels may be whole
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _to_rgb(image: Image.Image, background: tuple[int, int, int] | None) -> Image.Image:
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    has_alpha = image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info
    if has_alpha and background is not None:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        below = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(below, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> UInt8[np.ndarray, "h w"]:
    """16-bit by its full range; 32-bit and float, which have no agreed range, by what they hold."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
    low, high = min(values.min(), 0.0), values.max()
    if image.mode.startswith("I;16"):
        high = 65535.0
    elif image.mode == "F" and high <= 1:
        high = 1.0
    elif high <= 255:
        high = 255.0
    elif high <= 65535:
        high = 65535.0
    return np.rint((values - low) / max(high - low, 1e-12) * 255).astype(np.uint8)
