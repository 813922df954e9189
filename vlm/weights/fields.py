"""Values from a checkpoint's JSON files, each checked for its type and its size.

Every error names the file, the field and the value. The largest sizes are far beyond those of any
published model, and small enough that nothing built from them can exhaust a machine before the
weights are seen not to fit.
"""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from etils import epath

from vlm.errors import CheckpointError, show

_SHOWN, _LONG = 20, 240  # names in a message, and characters of each
_MAX_FILE = 200_000_000  # bytes; the largest published tokenizer.json has 35 million
MAX_LAYERS = 1_000
MAX_PIXELS = 16_384  # along a side
_MAX_TOKENS = 2**24  # rows of a table
_MAX_SIZE = 2**18  # of every other kind, such as widths

_LARGEST = {
    "layers": MAX_LAYERS,
    "num_hidden_layers": MAX_LAYERS,
    "image_size": MAX_PIXELS,
    "patch_size": MAX_PIXELS,
    "vocab_size": _MAX_TOKENS,
}


def read_json(path: epath.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it is missing, torn, too large, nested too deep, or holds something else.
    """
    try:
        if (length := path.stat().length) > _MAX_FILE:
            raise CheckpointError(
                f"{path} has {length:,} bytes, which no file of settings has: download it again"
            )
        values = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deep to be read: get it again") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): download it again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no object of fields: download it again")
    return values


def read_json_of_format(path: epath.Path, newest: int) -> dict[str, Any]:
    """The object in a JSON file of our own, whose `format` must be one that is known.

    Raises:
        CheckpointError: as `read_json`, or it was written by a later vlm.
    """
    about = read_json(path)
    version = integer(about.get("format"), f"{path}: format")
    if version > newest:
        raise CheckpointError(
            f"{path} is of format {version} and this vlm reads up to {newest}: update vlm"
        )
    return about


def integer(value: Any, where: str, low: int = 1, high: int = _MAX_SIZE) -> int:
    """`value` if it is a whole number from `low` to `high`.

    Raises:
        CheckpointError: it is not; `where` names the file and the field.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"{where} is {show(value)}, not a whole number")
    if not low <= value <= high:
        raise CheckpointError(f"{where} is {show(value)}: it must be from {low:,} to {high:,}")
    return value


def number(value: Any, where: str, *, above: float = -math.inf) -> float:
    """`value` as a float if it is a finite number greater than `above`.

    Raises:
        CheckpointError: it is not; `where` names the file and the field.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CheckpointError(f"{where} is {show(value)}, not a number")
    # Compared as it is: a whole number may be too large for a float.
    if not -1e300 < value < 1e300:
        raise CheckpointError(f"{where} is {show(value)}, not a finite number")
    if not value > above:
        raise CheckpointError(f"{where} is {show(value)}: it must be greater than {above:g}")
    return float(value)


def string(value: Any, where: str) -> str:
    """`value` if it is a string.

    Raises:
        CheckpointError: it is not; `where` names the file and the field.
    """
    if not isinstance(value, str):
        raise CheckpointError(f"{where} is {show(value)}, not a string")
    return value


def boolean(value: Any, where: str) -> bool:
    """`value` if it is true or false.

    Raises:
        CheckpointError: it is not; `where` names the file and the field.
    """
    if not isinstance(value, bool):
        raise CheckpointError(f"{where} is {show(value)}, not true or false")
    return value


def fields(value: Any, where: str) -> dict[str, Any]:
    """`value` if it is an object of fields; null counts as an empty one.

    Raises:
        CheckpointError: it is not; `where` names the file and the field.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is {show(value)}, not an object of fields")
    return value


def choice(value: Any, choices: Collection[Any], where: str) -> Any:
    """Return `value` if it is one of the choices.

    Raises:
        CheckpointError: it is not; `where` names the file and the field.
    """
    if value not in list(choices):
        raise CheckpointError(
            f"{where} is {show(value)}: vlm supports {', '.join(map(str, choices))}"
        )
    return value


def first_group(pattern: re.Pattern[str], name: str) -> str:
    """The first group of a pattern in a name that was chosen because it matches."""
    match = pattern.match(name)
    assert match is not None, f"{name} is of another family"
    return match[1]


def with_defaults(
    given: Mapping[str, Any], defaults: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The `defaults` with those fields `given` that have one, each of the type of its default.

    A null counts as absent. A size is at least 1, an id of a token at least 0, and an epsilon
    greater than 0. A default of None accepts anything: who reads the field checks it.

    Raises:
        CheckpointError: a field of another type, or a size out of bounds.
    """
    values = dict(defaults)
    for name, default in defaults.items():
        value, place = given.get(name), f"{where}.{name}"
        if value is None:
            continue
        if isinstance(default, bool):
            value = boolean(value, place)
        elif isinstance(default, int):
            low = 0 if name.endswith("_id") else 1
            high = _MAX_TOKENS if name.endswith("_id") else _LARGEST.get(name, _MAX_SIZE)
            value = integer(value, place, low, high)
        elif isinstance(default, float):
            value = number(value, place, above=0.0 if name.endswith("eps") else -math.inf)
        elif isinstance(default, str):
            value = string(value, place)
        values[name] = value
    return values


def list_names(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    shown = [name if name.isprintable() else repr(name) for name in names[:_SHOWN]]
    shown = [name if len(name) <= _LONG else f"{name[:_LONG]}..." for name in shown]
    more = f", and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(shown) + more
