"""Values from a checkpoint's JSON files, each checked for its type and its size.

Every reader raises a CheckpointError that names the file and the field (`where`) and the value. The
upper limits are far beyond any published model, yet small enough that nothing built from them can
exhaust the memory before the weights turn out not to fit.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from etils import epath

from vlm._json import parse
from vlm.errors import CheckpointError, brief

_SHOWN, _LONG = 20, 240  # names in a message, and characters of each
_MAX_FILE = 200_000_000  # bytes; the largest published tokenizer.json has 35 million
MAX_LAYERS = 1_000
MAX_PIXELS = 16_384  # along a side
_MAX_TOKENS = 2**24  # rows of a table
_MAX_SIZE = 2**18  # all other sizes, such as widths

_LARGEST = {
    "layers": MAX_LAYERS,
    "num_hidden_layers": MAX_LAYERS,
    "image_size": MAX_PIXELS,
    "patch_size": MAX_PIXELS,
    "vocab_size": _MAX_TOKENS,
}


def read_json(path: epath.Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        CheckpointError: it is missing, damaged, too large, nested too deep, or no object.
    """
    values = _read(path)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no object of fields: download it again")
    return values


def read_list(path: epath.Path) -> list[Any]:
    """Read the list in a JSON file.

    Raises:
        CheckpointError: as `read_json`, or no list.
    """
    values = _read(path)
    if not isinstance(values, list):
        raise CheckpointError(f"{path} holds no list: download it again")
    return values


def _read(path: epath.Path) -> Any:
    try:
        if (length := path.stat().length) > _MAX_FILE:
            raise CheckpointError(
                f"{path} has {length:,} bytes, which no file of settings has: download it again"
            )
        return parse(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): download it again") from None


def read_json_of_format(path: epath.Path, newest: int) -> dict[str, Any]:
    """Read the object in one of vlm's JSON files, and check its `format`.

    Raises:
        CheckpointError: as `read_json`, or a later vlm wrote it.
    """
    about = read_json(path)
    version = integer(about.get("format"), f"{path}: format")
    if version > newest:
        raise CheckpointError(
            f"{path} is of format {version} and this vlm reads up to {newest}: update vlm"
        )
    return about


def integer(value: Any, where: str, low: int = 1, high: int = _MAX_SIZE) -> int:
    """Check that `value` is an integer from `low` to `high`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"{where} is {brief(value)}, not a whole number")
    if not low <= value <= high:
        raise CheckpointError(f"{where} is {brief(value)}: it must be from {low:,} to {high:,}")
    return value


def integers(value: Any, where: str, low: int = 1) -> tuple[int, ...]:
    """Check that `value` is a list of integers from `low`, such as one for each stage."""
    if not isinstance(value, list | tuple) or not 0 < len(value) <= MAX_LAYERS:
        raise CheckpointError(f"{where} is {brief(value)}, not a list of whole numbers")
    return tuple(integer(item, where, low) for item in value)


def number(value: Any, where: str, *, above: float = -math.inf) -> float:
    """Check that `value` is a finite number greater than `above`, and convert it to float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CheckpointError(f"{where} is {brief(value)}, not a number")
    if not -1e300 < value < 1e300:  # compared before conversion: an int may be too large
        raise CheckpointError(f"{where} is {brief(value)}, not a finite number")
    if not value > above:
        raise CheckpointError(f"{where} is {brief(value)}: it must be greater than {above:g}")
    return float(value)


def string(value: Any, where: str) -> str:
    """Check that `value` is a string."""
    if not isinstance(value, str):
        raise CheckpointError(f"{where} is {brief(value)}, not a string")
    return value


def boolean(value: Any, where: str) -> bool:
    """Check that `value` is true or false."""
    if not isinstance(value, bool):
        raise CheckpointError(f"{where} is {brief(value)}, not true or false")
    return value


def fields(value: Any, where: str) -> dict[str, Any]:
    """Check that `value` is an object of fields; null becomes an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is {brief(value)}, not an object of fields")
    return value


def choice(value: Any, choices: Collection[Any], where: str) -> Any:
    """Check that `value` is one of the choices."""
    if value not in list(choices):
        raise CheckpointError(
            f"{where} is {brief(value)}: vlm supports {', '.join(map(str, choices))}"
        )
    return value


def with_defaults(
    given: Mapping[str, Any], defaults: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Replace `defaults` by the fields `given`, each checked for the type of its default.

    A null counts as absent. A size is at least 1, a token id at least 0, and an epsilon greater
    than 0. A default of None accepts any value: the caller checks it.
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
    """Join the first names for a message, and the number of the others."""
    shown = [name if name.isprintable() else repr(name) for name in names[:_SHOWN]]
    shown = [name if len(name) <= _LONG else f"{name[:_LONG]}..." for name in shown]
    more = f", and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(shown) + more
