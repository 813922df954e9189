"""The images of requests: data URLs to bytes, within limits, and nothing fetched unless allowed."""

import base64
import binascii
import io
import re
import urllib.request
from urllib.parse import unquote_to_bytes

from PIL import Image

from vlm.errors import DataError, first_line
from vlm.inputs.opening import FORMATS
from vlm.serve.limits import Limits, Refused

_DATA_URL = re.compile(r"data:([\w.+/-]*)((?:;[\w.+-]+=[^;,]*)*)(;base64)?,", re.ASCII)
FETCH_SECONDS = 10


def image_bytes(text: str, limits: Limits, name: str) -> bytes:
    """The image file that a client sent as a data URL, or as an address where that is allowed.

    Raises:
        Refused: no data URL, not base64, an address, or too many pixels; `name` is what it is
            called.
    """
    if text.startswith(("http://", "https://")):
        data = _fetched(text, limits, name)
    else:
        data = _decoded(text, name)
    if not data:
        raise Refused(f"{name} is empty: send a whole image file", 400, "invalid_image")
    _check_pixels(data, limits.pixels, name)
    return data


def _decoded(text: str, name: str) -> bytes:
    head = _DATA_URL.match(text[:512])
    if head is None:
        raise Refused(
            f"{name} is not a data URL: send it as data:image/jpeg;base64,...", 400, "invalid_image"
        )
    content = text[head.end() :]
    if not head[3]:
        return unquote_to_bytes(content)
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(
            f"{name} is not in base64: encode the bytes of the file, with padding and without "
            "line breaks",
            400,
            "invalid_image",
        ) from None


def _check_pixels(data: bytes, most: int, name: str) -> None:
    """Refuse by its header an image that would not fit, before anything of it is decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        width = height = 0
    except Exception:
        return  # what is wrong with it is said where it is decoded
    if not width * height or width * height > most:
        size = f"{width:,} x {height:,}" if width else "too many"
        raise Refused(
            f"{name} has {size} pixels and the server takes {most:,}: make it smaller",
            413,
            "image_too_large",
        )


def _fetched(url: str, limits: Limits, name: str) -> bytes:
    if not limits.urls:
        raise Refused(
            f"{name} is an address, and this server fetches none: send the image itself as "
            "data:image/jpeg;base64,...",
            400,
            "url_not_allowed",
        )
    try:
        with urllib.request.urlopen(url, timeout=FETCH_SECONDS) as reply:  # http and https alone
            data = reply.read(limits.body_bytes + 1)
    except (OSError, ValueError) as error:
        raise DataError(f"{name} could not be fetched ({first_line(error)})") from None
    if len(data) > limits.body_bytes:
        raise Refused(f"{name} is a file over {limits.body_bytes:,} bytes", 413, "image_too_large")
    return data
