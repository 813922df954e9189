"""Open an image from any source in mode RGB, with orientation and transparency applied."""

import contextlib
import importlib
import io
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np
from etils import epath
from jaxtyping import Float64
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError

from vlm.errors import ConfigError, DataError
from vlm.inputs.decoding_limits import (
    MAX_PIXELS,
    check_decoding,
    check_size,
    too_many_pixels,
)
from vlm.paths import as_path

# Everything that is accepted as an image: a PIL image, a path, the bytes of a file, or an array.
ImageLike = Image.Image | str | os.PathLike | bytes | np.ndarray
Smallest = Callable[[int, int], tuple[int, int]]  # target size from an image's (width, height)
OnError = Callable[[int, DataError], None]  # called with an image's position and the error

# Image formats by Pillow's names, with their file extensions: used by readers, by commands that
# search folders, and by `vlm data prepare` (which writes the first extension). Pillow would try
# thirty more: PostScript, which starts Ghostscript; game textures; medical and weather data; and
# formats that match almost any bytes.
FORMATS = {  # in the order in which they are tried
    "JPEG": (".jpg", ".jpeg", ".jfif", ".jpe", ".mpo"),  # an MPO file is a JPEG with extra data
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "AVIF": (".avif",),
    "TIFF": (".tif", ".tiff"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "PPM": (".ppm", ".pbm", ".pgm", ".pnm", ".pfm"),
    "QOI": (".qoi",),
}
# Formats of Pillow plugins: file extensions, module, extra of this package, display name.
ADDED_FORMATS = {
    "HEIF": ((".heic", ".heif", ".hif"), "pillow_heif", "heif", "HEIC"),
    "JXL": ((".jxl",), "pillow_jxl", "jxl", "JPEG XL"),
}
SUFFIXES = frozenset().union(*FORMATS.values(), *(added[0] for added in ADDED_FORMATS.values()))

_STRIP_PIXELS = 1 << 18  # converted at once

_ORIENTATION = 0x0112  # the EXIF tag
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TRANSPOSING = tuple(_TRANSPOSES[tag] for tag in (5, 6, 7, 8))  # swap width and height


def is_image(item: Any) -> bool:
    """Whether `item` is one image: a PIL image, a path, the bytes of a file, an array of pixels.

    An array is one image if it has two or three dimensions. With more it is several images, with
    fewer a list, for example of paths. The content is only checked by `open_image`.
    """
    if isinstance(item, Image.Image | str | os.PathLike | bytes):
        return True
    return len(getattr(item, "shape", ())) in (2, 3)


def one_or_many(images: Any) -> Iterator[Any]:
    """Iterate over `images`, which may also be a single image.

    Raises:
        DataError: neither an image nor a collection of them.
    """
    if is_image(images):
        return iter([images])
    if not isinstance(images, Iterable) or hasattr(images, "read"):  # a file iterates over lines
        raise DataError(_not_an_image("images", images))
    return iter(images)


def open_image(
    image: ImageLike,
    *,
    background: tuple[int, int, int] | None = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
    max_bytes: int | None = None,
    name: str = "the image",
    smallest: Smallest | None = None,
    decode: Literal["intended", "reference"] = "intended",
) -> Image.Image:
    """Open an image in mode RGB, with orientation, transparency and bit depth handled.

    EXIF orientation is applied, transparent images are composited on `background` (None drops the
    alpha channel), 16-bit and float greyscale are scaled to 8 bits. The format is detected from the
    content, not the name, and must be in `FORMATS`. Damaged files raise an error, even if
    `ImageFile.LOAD_TRUNCATED_IMAGES` is set. Of several frames the first is used.

    With `decode="reference"` none of that is corrected: the pixels are those of Pillow's
    `Image.open(file).convert("RGB")`, which open_clip, CLIP and CLIP_benchmark evaluate with.

    `smallest` maps the (width, height) of a JPEG file to the smallest acceptable size. The file is
    then decoded at 1/2, 1/4 or 1/8 of its size if that is large enough, which is much faster.

    `max_pixels` bounds the size, and `max_bytes` the memory that decoding takes; None is 24 bytes
    for each of `max_pixels`, which allows all sizes up to `max_pixels` of most formats. Both are
    checked by the header, like the number of scans of a JPEG, so that a decompression bomb is
    refused before it is decoded.

    Raises:
        DataError: missing, empty, damaged, too large, or not an image; the message names it.

    Example:
        >>> from vlm.inputs import open_image
        >>> open_image(np.zeros((4, 6, 3), np.uint8)).size
        (6, 4)
    """
    data = None
    if isinstance(image, Image.Image):
        name, smallest = getattr(image, "filename", "") or name, None  # keep a user's object whole
    elif isinstance(image, str | os.PathLike):
        name = os.fspath(image)
        image = _opened(data := read_image(image), name, max_pixels)
    elif isinstance(image, bytes):
        image = _opened(data := image, name, max_pixels)
    else:
        image = image_of_array(image, name)
    try:
        if isinstance(image, ImageFile.ImageFile):
            check_decoding(image, data, name, max_pixels, max_bytes)
        else:
            check_size(image, name, max_pixels)
        if smallest is not None and image.format == "JPEG":
            _draft(image, smallest, None if decode == "reference" else _orientation(image))
        with _strictly():
            # First, before reading EXIF data: that decodes too, and if decoding failed once, a
            # second attempt succeeds with half of the image.
            image.load()
        check_size(image, name, max_pixels)  # a frame may be larger than the header states
        if decode == "reference":
            return image if image.mode == "RGB" else image.convert("RGB")
        transpose = _orientation(image)
        image = _to_rgb(image, background)
        return image if transpose is None else image.transpose(transpose)
    except Image.DecompressionBombError:
        raise too_many_pixels(name, "too many", max_pixels) from None
    except DataError:
        raise
    except Exception as error:  # Pillow's parsers raise errors of any type
        raise DataError(
            f"{name} cannot be decoded ({_reason(error)}): replace or remove it"
        ) from error


class _StrictInThread(threading.local):
    """Value for Pillow's LOAD_TRUNCATED_IMAGES that is false only in threads that decode here."""

    off = False

    def __bool__(self) -> bool:
        return not self.off


_STRICT = _StrictInThread()


@contextlib.contextmanager
def _strictly() -> Iterator[None]:
    """Make damaged images raise in this thread, even if LOAD_TRUNCATED_IMAGES is set."""
    if not ImageFile.LOAD_TRUNCATED_IMAGES:
        yield
        return
    ImageFile.LOAD_TRUNCATED_IMAGES = _STRICT  # unchanged for other threads
    _STRICT.off = True
    try:
        yield
    finally:
        _STRICT.off = False


def read_image(image: epath.PathLike) -> bytes:
    """Read an image file; DataError if it is missing or cannot be read."""
    try:
        path = as_path(image)
    except ConfigError as error:
        raise DataError(str(error)) from None
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"there is no image {path}: check the path") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, not an image: give the files inside it") from None
    except Exception as error:  # clients of buckets raise their own types
        reason = getattr(error, "strerror", None) or _reason(error)
        raise DataError(f"{os.fspath(image)} cannot be read ({reason})") from error


def _opened(data: bytes, name: str, max_pixels: int) -> Image.Image:
    if not data:
        raise DataError(f"{name} is empty: replace or remove it")
    if max_pixels > (Image.MAX_IMAGE_PIXELS or max_pixels):
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's own limit, which would be lower
    try:
        with _strictly():
            return Image.open(io.BytesIO(data), formats=_formats_for(data, name))
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise too_many_pixels(name, "too many", max_pixels) from None
    except UnidentifiedImageError:
        raise DataError(_unidentified(data, name)) from None
    except Exception as error:
        raise DataError(f"{name} is damaged ({_reason(error)}): replace or remove it") from error


_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
_JXL_STARTS = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")


def _formats_for(data: bytes, name: str) -> tuple[str, ...]:
    """Return the formats to try; import the Pillow plugin if `data` needs one."""
    brands = data[8 : min(int.from_bytes(data[:4], "big"), 256)] if data[4:8] == b"ftyp" else b""
    if any(brand in brands for brand in _HEIF_BRANDS):
        added = "HEIF"
    elif data.startswith(_JXL_STARTS):
        added = "JXL"
    else:
        return tuple(FORMATS)
    _, module, extra, title = ADDED_FORMATS[added]
    try:
        plugin = importlib.import_module(module)
    except ImportError:
        raise DataError(
            f'{name} is {title}, which needs another package: run pip install "vlm-jax[{extra}]"'
        ) from None
    if added not in Image.OPEN:  # the plugin for JPEG XL registers itself on import
        plugin.register_heif_opener()
    return (added,)


def extension_of(data: bytes) -> str:
    """Return the extension (without its dot) for an image file with these bytes."""
    with _opened(data, "the image", 0) as image:
        kind = image.format or ""
    if kind in ADDED_FORMATS:
        return ADDED_FORMATS[kind][0][0][1:]
    return FORMATS["JPEG" if kind == "MPO" else kind][0][1:]


# Other content often found in files named as images, by its first bytes.
_MISTAKEN = {
    b"<!doctype html": "a web page",
    b"<html": "a web page",
    b"<?xml": "XML, such as an SVG drawing",
    b"<svg": "an SVG drawing",
    b"%pdf": "a PDF",
    b"%!ps": "PostScript",
    b"version https://git-lfs": "a pointer of Git LFS (git lfs pull fetches the file)",
}


def _unidentified(data: bytes, name: str) -> str:
    """Build the error message for bytes in an unknown format."""
    start = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    kind = next((k for s, k in _MISTAKEN.items() if start.startswith(s)), "")
    *most, last = FORMATS
    formats = f"{', '.join(most)} or {last}"
    if kind:
        return f"{name} is {kind}, not an image of {formats}: convert or remove it"
    return f"{name} is not an image, or a damaged one, of {formats}: replace or remove it"


def _reason(error: Exception) -> str:
    """Shorten the message of an exception to one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _not_an_image(name: str, item: Any) -> str:
    return (
        f"{name} is a {type(item).__name__}: give a PIL image, a path, the bytes of an image file "
        "or a uint8 array"
    )


def as_array(image: Any, name: str = "the image") -> np.ndarray:
    """Convert an array of any library to NumPy, if possible without a copy."""
    if not getattr(image, "shape", ()):
        raise DataError(_not_an_image(name, image))
    try:
        return np.asarray(image)
    except Exception as error:  # for example a tracer
        raise DataError(f"{name} is not an array for NumPy ({_reason(error)})") from error


def image_of_array(image: Any, name: str) -> Image.Image:
    """Make an image of a uint8 array; DataError for another type or shape."""
    array = as_array(image, name)
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


def _draft(image: Any, smallest: Smallest, transpose: Image.Transpose | None) -> None:
    """Set a JPEG file to be decoded at a fraction of its size, before `transpose` is applied."""
    if transpose is not None and (image.width % 8 or image.height % 8):
        return  # the last pixel covers only a part of one, and transposing would make it the first
    swaps = transpose in _TRANSPOSING
    width, height = smallest(*(reversed(image.size) if swaps else image.size))
    image.draft(None, (height, width) if swaps else (width, height))


def _orientation(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TRANSPOSES.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata, while the pixels are complete
        return None


def _to_rgb(image: Image.Image, background: tuple[int, int, int] | None) -> Image.Image:
    """Convert to RGB, in strips where that takes more memory than the result."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        low, high = _range(image)
        return _in_strips(image, lambda strip: _eight_bits(strip, low, high))
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # None only if converted in place
        return converted
    has_alpha = image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info
    if has_alpha and background is not None:
        return _in_strips(image, lambda strip: _composite(strip, background))
    return image.convert("RGB")


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield each strip of an image and its first row."""
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    out = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        out.paste(convert(strip), (0, top))
    return out


def _composite(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    below = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(below, image.convert("RGBA")).convert("RGB")


def _values(image: Image.Image) -> Float64[np.ndarray, "h w"]:
    return np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)


def _range(image: Image.Image) -> tuple[float, float]:
    """Values that become black and white: of 16 bits the full range, else by the values."""
    if image.mode.startswith("I;16"):
        return 0.0, 65535.0
    low, high = 0.0, -math.inf
    for _, strip in _strips(image):
        values = _values(strip)
        low, high = min(low, values.min()), max(high, values.max())
    if image.mode == "F" and high <= 1:
        high = 1.0
    elif high <= 255:
        high = 255.0
    elif high <= 65535:
        high = 65535.0
    return low, high


def _eight_bits(image: Image.Image, low: float, high: float) -> Image.Image:
    scaled = np.rint((_values(image) - low) / max(high - low, 1e-12) * 255)
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
