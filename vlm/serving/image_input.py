"""Images of requests: decode data URLs, check limits, and fetch http(s) URLs if allowed."""

import base64
import binascii
import io
import re
from typing import Any
from urllib.parse import unquote_to_bytes

from PIL import Image

from vlm.inputs.opening import FORMATS
from vlm.serving.limits import Limits, RequestError

_DATA_URL = re.compile(r"data:([\w.+/-]*)((?:;[\w.+-]+=[^;,]*)*)(;base64)?,", re.ASCII)


def is_url(image: Any) -> bool:
    """Whether an image of a request is an http(s) URL."""
    return isinstance(image, str) and image[:8].lower().startswith(("http://", "https://"))


def image_bytes(given: str | bytes, limits: Limits, name: str) -> bytes:
    """Return the bytes of an image file from a data URL, or downloaded ones after a check.

    Args:
        name: name of the image in error messages.

    Raises:
        RequestError: not a data URL, not base64, or too many pixels.
    """
    if is_url(given):
        raise RequestError(
            f"{name} is a URL, which this server does not fetch: send the image as "
            "data:image/jpeg;base64,...",
            400,
            "url_not_allowed",
        )
    data = given if isinstance(given, bytes) else _decode(given, name)
    if not data:
        raise RequestError(f"{name} is empty: send an image file", 400, "invalid_image")
    _check_pixels(data, limits.pixels, name)
    return data


def _decode(text: str, name: str) -> bytes:
    head = _DATA_URL.match(text[:512])
    if head is None:
        raise RequestError(
            f"{name} is not a data URL: send it as data:image/jpeg;base64,...", 400, "invalid_image"
        )
    content = text[head.end() :]
    if not head[3]:
        return unquote_to_bytes(content)
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(
            f"{name} is not valid base64: encode the bytes of the file, with padding and without "
            "line breaks",
            400,
            "invalid_image",
        ) from None


def _check_pixels(data: bytes, limit: int, name: str) -> None:
    """Reject an image with too many pixels by its header, before decoding."""
    try:
        with Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        width = height = 0
    except Exception:
        return  # decoding reports the error
    if not width * height or width * height > limit:
        size = f"{width:,} x {height:,}" if width else "too many"
        raise RequestError(
            f"{name} has {size} pixels, and the limit is {limit:,}: send a smaller one",
            413,
            "image_too_large",
        )
