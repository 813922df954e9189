"""Standard JSON: NaN and infinity become null."""

import json
import math
from typing import Any


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
