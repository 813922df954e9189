"""Careful opening: any image, from wherever it comes, as its author meant it to look, in RGB."""

import io
import os

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image, ImageCms, ImageOps

from vlm.errors import DataError
from vlm.paths import as_path

ImageLike = Image.Image | str | os.PathLike | bytes | np.ndarray

MAX_PIXELS = 89_478_485  # a quarter of a GiB as RGB: where Pillow itself begins to warn

_ORIENTATION = 0x0112  # the EXIF tag


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
