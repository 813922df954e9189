"""Limits on what decoding an image file may cost, checked by its header before it is decoded."""

import re
from typing import Any

from PIL import Image

from vlm.errors import DataError

MAX_PIXELS = 89_478_485  # a quarter of a GiB as RGB; Pillow's own warning limit
BYTES_PER_PIXEL = 24  # of `max_pixels`: the memory for one image, 2 GiB at MAX_PIXELS

# A scan of a progressive JPEG may take 60 bytes of the file and pass over all pixels. 100 is also
# the limit of libtiff and GraphicsMagick; encoders write about 10.
MAX_SCANS, ALWAYS_SCANS = 100, 24
MAX_SCANNED_PIXELS = 1 << 31  # over all scans: about 2 s of decoding
MAX_TILE = 16 << 20  # bytes of a TIFF tile that is larger than the image

# Peak bytes per pixel while Pillow decodes these formats, rounded up. They were measured on images
# of 24 million pixels by tests/inputs/decoding_memory.py; of HEIF and JXL they are estimates.
_DECODERS = {"WEBP": 18, "AVIF": 20, "HEIF": 20, "QOI": 16, "JPEG2000": 26, "JXL": 40}
_CONVERTED = 8  # the decoded image, at most 4 bytes per pixel, and its RGB version

_SOS, _EOI = 0xDA, 0xD9  # start of scan, end of image
_SEQUENTIAL = (0xC0, 0xC1)  # start of a frame with Huffman codes that is not progressive
_START_OF_SCAN = bytes((0xFF, _SOS))
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")  # not stuffing and not restart markers
_TILE_WIDTH, _TILE_LENGTH, _STRIP_ROWS, _SAMPLE_BITS = 322, 323, 278, 258  # TIFF tags


class TooLargeError(DataError):
    """An image whose decoding would exceed a limit."""

    def __init__(self, name: str, fact: str, fix: str):
        super().__init__(f"{name} {fact}: {fix}")
        self.fact = fact  # without the name, for callers that suggest another fix


def check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    """Check the number of pixels of an image.

    Raises:
        DataError: none, or more than `max_pixels`.
    """
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise too_many_pixels(name, f"{image.width:,} x {image.height:,} = {pixels:,}", max_pixels)
    if pixels == 0:
        raise DataError(f"{name} has no pixels ({image.width}x{image.height}): remove it")


def too_many_pixels(name: str, pixels: str, max_pixels: int) -> TooLargeError:
    fact = f"has {pixels} pixels, over the limit of {max_pixels:,}"
    return TooLargeError(name, fact, "raise max_pixels if you trust it")


def check_decoding(
    image: Image.Image, data: bytes | None, name: str, max_pixels: int, max_bytes: int | None = None
) -> int:
    """Check by an opened image's header what its decoding costs; return its peak memory in bytes.

    Args:
        image: as `PIL.Image.open` returns it, not yet decoded.
        data: the file, if known, to count the scans of a JPEG.
        name: of the image in error messages.
        max_pixels: maximum number of pixels.
        max_bytes: maximum memory; None: `BYTES_PER_PIXEL` for each of `max_pixels`.

    Raises:
        DataError: decoding would exceed a limit.
    """
    check_size(image, name, max_pixels)
    pixels, scans = image.width * image.height, 1
    if data is not None and image.format in ("JPEG", "MPO"):
        most = min(MAX_SCANS, max(ALWAYS_SCANS, MAX_SCANNED_PIXELS // pixels))
        if (scans := count_scans(data, most + 1)) > most:
            raise DataError(
                f"{name} is a JPEG of {pixels:,} pixels with more than {most} scans, which would "
                "take long to decode: save it again, or remove it"
            )
    tile = _tile_bytes(image) if image.format == "TIFF" else 0
    if tile > MAX_TILE + BYTES_PER_PIXEL * pixels:
        raise DataError(
            f"{name} is a TIFF of {pixels:,} pixels with tiles of {tile:,} bytes, which would take "
            "long to decode: save it again, or remove it"
        )
    needed = int(max(_CONVERTED * pixels, _loading_bytes(image, scans) + tile))
    max_bytes = BYTES_PER_PIXEL * max_pixels if max_bytes is None else max_bytes
    if needed > max_bytes:
        fact = (
            f"of {image.width:,} x {image.height:,} pixels would take {needed:,} bytes of memory "
            f"while it is decoded from {image.format}, over the limit of {max_bytes:,}"
        )
        raise TooLargeError(name, fact, "make it smaller, or raise max_pixels if you trust it")
    return needed


def count_scans(data: bytes, most: int) -> int:
    """Count the scans of the first image in a JPEG file, up to `most`.

    Previews inside of segments do not count, nor images behind the first. If the first scan of a
    sequential frame has all components, libjpeg refuses another one. Then the rest of the file,
    which is nearly all of it, is not searched.
    """
    scans, at, following = 0, 2, data.find(_START_OF_SCAN)
    components = b""
    while scans < most and following >= 0:  # in most files until the only scan begins
        marker = _MARKER.search(data, at)
        if marker is None or (code := marker[1][0]) == _EOI:
            break
        scans += code == _SOS
        at = marker.end()
        if code in _SEQUENTIAL:
            components = data[at + 7 : at + 8]
        elif code == _SOS and scans == 1 and data[at + 2 : at + 3] == components != b"":
            return 1
        if not 0xD0 <= code <= 0xD8 and code != 0x01:  # all others are segments with a length
            at += max(2, int.from_bytes(data[at : at + 2], "big"))
        if following < at:
            following = data.find(_START_OF_SCAN, at)
    return max(1, scans)


def _loading_bytes(image: Any, scans: int) -> float:
    """Estimate the peak memory of `image.load()`."""
    pixels = image.width * image.height
    if (known := _DECODERS.get(image.format)) is not None:
        return known * pixels
    stored = 1 if image.mode in ("1", "L", "P") else 2 if image.mode.startswith("I;16") else 4
    if image.format in ("JPEG", "MPO") and (scans > 1 or image.info.get("progressive")):
        # Coefficients of 2 bytes are held until the last scan, by component.
        sampling = [across * down for _, across, down, _ in image.layer]
        largest = max(layer[1] for layer in image.layer) * max(layer[2] for layer in image.layer)
        return (stored + 2 * sum(sampling) / largest) * pixels
    return stored * pixels


def _tile_bytes(image: Any) -> int:
    """Return the size of a TIFF file's tiles or strips, one of which is in memory."""
    tags = image.tag_v2
    try:
        width = int(tags.get(_TILE_WIDTH, image.width))
        rows = min(int(tags.get(_STRIP_ROWS, image.height)), image.height)
        bits = tags.get(_SAMPLE_BITS, (8,))
        return width * int(tags.get(_TILE_LENGTH, rows)) * -(-sum(map(int, bits)) // 8)
    except (TypeError, ValueError):  # values of another type, which libtiff refuses
        return 0
