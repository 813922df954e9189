"""Image files of requests: decode data URLs."""

import base64
import binascii
import re
from typing import Any
from urllib.parse import unquote_to_bytes

from vlm.serving.limits import RequestError

_DATA_URL = re.compile(r"data:([\w.+/-]*)((?:;[\w.+-]+=[^;,]*)*)(;base64)?,", re.ASCII)


def is_url(image: Any) -> bool:
    """Whether an image of a request is an http(s) URL."""
    return isinstance(image, str) and image[:8].lower().startswith(("http://", "https://"))


def image_bytes(given: str | bytes, name: str) -> bytes:
    """Return the bytes of an image file from a data URL, or downloaded ones.

    Args:
        name: name of the image in error messages.

    Raises:
        RequestError: not a data URL, or not base64.
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
