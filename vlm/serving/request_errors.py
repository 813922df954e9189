"""Messages for invalid request bodies, with fields in the notation of the OpenAI API."""

from collections.abc import Sequence
from typing import Any

from vlm.serving.limits import RequestError


def validation_error(errors: Sequence[Any], body: Any) -> RequestError:
    """Return the error of a body that does not fit its schema.

    Args:
        errors: errors of pydantic, whose places start with "body".
        body: the parsed body.
    """
    # Of the alternatives of a field, the one that fits furthest is the one that was meant.
    first = max(errors, key=lambda error: len(_path(error["loc"][1:], body)))
    reason = first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] == "json_invalid":
        return RequestError(f"the body is not JSON ({reason})", 400, "invalid_json")
    field = field_name(_path(first["loc"][1:], body))
    message = f"{field or 'the body'}: {reason}"
    return RequestError(message, 422, "invalid_field", param=field)


def field_name(path: Sequence[str | int]) -> str | None:
    """Return a path in the notation of OpenAI, such as "input[0].image_url"; None for the body.

    Example:
        >>> from vlm.serving.request_errors import field_name
        >>> field_name(["input", 0, "image_url"])
        'input[0].image_url'
    """
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in path]
    name = "".join(parts).removeprefix(".").encode("utf-8", "replace").decode()
    return name[:100] or None


def _path(place: Sequence[str | int], body: Any) -> list[str | int]:
    """Return the keys and positions of an error's place, without pydantic's names of types."""
    path: list[str | int] = []
    for number, part in enumerate(place):
        last = number == len(place) - 1
        if isinstance(body, dict) and isinstance(part, str) and (part in body or last):
            path.append(part)  # the last one may be a field that is missing
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            path.append(part)
            body = body[part]
    return path
