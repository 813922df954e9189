"""Metadata columns of an index, and the filters that select its rows."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from vlm.errors import ConfigError

Value = str | int | float | bool | None
Where = Mapping[str, Any] | Callable[[dict[str, np.ndarray]], np.ndarray]

LEAST_TIME = 10**17  # nanoseconds: March 1973; smaller numbers are no times

COMPARISONS: dict[str, Callable] = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le,
    ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


def checked_columns(metadata: Mapping[str, Iterable[Value]], count: int) -> dict[str, list[Value]]:
    """Validate metadata columns and convert them to lists of `count` plain values.

    Raises:
        ConfigError: another number of values, or one that is not a text, number, bool or None.
    """
    columns = {}
    for name, values in metadata.items():
        if not isinstance(name, str) or not name or isinstance(values, str):
            raise ConfigError(f"metadata column {name!r} must be a name with a list of values")
        column = [value.item() if isinstance(value, np.generic) else value for value in values]
        if len(column) != count:
            raise ConfigError(
                f"metadata column {name!r} has {len(column)} values for {count} items: "
                "give one each"
            )
        for value in column:
            if value is not None and not isinstance(value, str | int | float):
                raise ConfigError(
                    f"metadata column {name!r} holds {value!r}: give texts, numbers or None"
                )
        columns[name] = column
    return columns


def as_array(column: list[Value]) -> np.ndarray:
    """Convert a column to an array; missing values become NaN or the empty text."""
    known = [value for value in column if value is not None]
    if known and all(isinstance(value, str) for value in known):
        return np.asarray(["" if value is None else value for value in column])
    if any(isinstance(value, str) for value in known):
        return np.asarray(column, object)
    if len(known) < len(column):
        return np.asarray([np.nan if value is None else value for value in column], np.float64)
    return np.asarray(column)


def matching(
    columns: Mapping[str, list[Value]], count: int, where: Where
) -> Bool[np.ndarray, " n"]:
    """Mask of the rows, of `count`, that pass a filter.

    Args:
        columns: the metadata.
        count: the number of rows.
        where: for each named column the value it must equal, or a list, set or tuple of values of
            which it must be one; or a function of the columns, as arrays, that returns a bool for
            each row: `lambda columns: columns["year"] >= 2020`.

    Raises:
        ConfigError: an unknown column, or a function that returns something else.
    """
    if callable(where):
        try:
            kept = np.asarray(where({name: as_array(column) for name, column in columns.items()}))
        except KeyError as error:
            raise ConfigError(_unknown(error.args[0], columns)) from None
        if kept.shape != (count,) or kept.dtype != bool:
            raise ConfigError(
                f"the filter returned {kept.dtype}{kept.shape}: it must return a bool for each of "
                f"the {count} rows"
            )
        return kept
    if not isinstance(where, Mapping):
        raise ConfigError(
            f"where is a {type(where).__name__}: give a dict of columns and values, or a function"
        )
    kept = np.ones(count, bool)
    for name, wanted in where.items():
        if name not in columns:
            raise ConfigError(_unknown(name, columns))
        several = isinstance(wanted, list | tuple | set | frozenset)
        allowed = set(wanted) if several else {wanted}
        kept &= np.fromiter((value in allowed for value in columns[name]), bool, count)
    return kept


class Condition(NamedTuple):
    """Comparison of a column with a value, as `year >= 2020`; see COMPARISONS."""

    column: str
    comparison: str
    value: str | float


def where_all(conditions: Sequence[Condition]) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """Combine conditions (by "and") into a filter for `RetrievalIndex.search`.

    A column of times, such as `modified`, may be compared with a date: "2024-05-31", a time of day
    after it, and a time zone after that. Without one it is local time.

    The filter raises a ConfigError if a column of numbers is compared with another text.
    """

    def holds(columns: Mapping[str, np.ndarray]) -> np.ndarray:
        kept = np.True_
        for name, comparison, value in conditions:
            column = columns[name]
            if column.dtype.kind == "U":  # compared as text
                value = value if isinstance(value, str) else f"{value:g}"
            elif isinstance(value, str) and column.dtype.kind != "O":
                value = _nanoseconds(name, column, value)
            try:
                kept = kept & np.asarray(COMPARISONS[comparison](column, value), bool)
            except TypeError:  # texts and numbers cannot be ordered
                raise ConfigError(
                    f"{name!r} holds texts and numbers, which {comparison} cannot order: "
                    "compare them with = or !="
                ) from None
        return np.asarray(kept)

    return holds


def are_times(values: Any) -> bool:
    """Whether numbers can be times in nanoseconds since 1970, as in the column `modified`."""
    numbers = np.asarray(values, np.float64)
    numbers = numbers[~np.isnan(numbers)]
    return bool(len(numbers) and numbers.min() >= LEAST_TIME and numbers.max() < 1 << 63)


def _nanoseconds(name: str, column: np.ndarray, text: str) -> int:
    """Return a date as nanoseconds since 1970.

    Raises:
        ConfigError: it is none, or the column has other numbers.
    """
    if not are_times(column):
        raise ConfigError(f"the numbers of {name!r} are compared with the text {text!r}")
    try:
        since = datetime.fromisoformat(text).astimezone() - datetime(1970, 1, 1, tzinfo=UTC)
    except (ValueError, OverflowError, OSError):
        raise ConfigError(
            f"the times of {name!r} are compared with {text!r}: give a date such as 2024-05-31"
        ) from None
    return since // timedelta(microseconds=1) * 1000


def _unknown(name: Any, columns: Mapping[str, Any]) -> str:
    known = ", ".join(sorted(columns)) or "none: give `metadata` when adding"
    return f"the index has no metadata column {name!r}; it has {known}"
