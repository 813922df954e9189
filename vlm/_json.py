"""Standard JSON: NaN and infinity become null, and parsing takes a bounded amount of memory."""

import json
import math
import re
from collections.abc import Callable
from typing import Any

MAX_VALUES = 4_000_000  # of a file; the largest published tokenizer.json has 1.5 million
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"', re.DOTALL)


def to_json(value: Any, **options: Any) -> str:
    """Convert a value to JSON, with null for numbers that are not finite."""
    return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: Any) -> Any:
    """Replace every number in a value that is not finite by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value


def parse(text: str, most: int = MAX_VALUES, hook: Callable[..., Any] | None = None) -> Any:
    """Parse JSON of at most `most` values; a few bytes of text may become a hundred of memory.

    Args:
        hook: the `object_pairs_hook` of `json.loads`.

    Raises:
        ValueError: no JSON, too many values, or nested too deep.
    """
    check_count(text, most)
    try:
        return json.loads(text, object_pairs_hook=hook)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def check_count(text: str, most: int = MAX_VALUES) -> None:
    """Raise a ValueError if a JSON text has more than `most` values, counted without parsing it."""
    count = _count(text)
    if count > 4 * most or (count > most and _count(without_strings(text)) > most):
        raise ValueError(f"it has more than {most:,} values")


def without_strings(text: str) -> str:
    """Remove the strings of a JSON text, so that its other characters can be counted."""
    return _STRING.sub("", text)


def _count(text: str) -> int:
    return text.count(",") + text.count("[") + text.count("{")
