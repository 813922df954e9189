"""JSON as its standard has it, which knows no NaN and no infinity: these become null."""

import json
import math
from typing import Any


def to_json(value: Any, **options: Any) -> str:
    """The JSON of a value, with null for numbers that are not finite; `options` of json.dumps."""
    return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: Any) -> Any:
    """The value with None in place of every number in it that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value
