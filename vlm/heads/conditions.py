"""Conditions on the metadata of an index: a column, a comparison and a value; all must hold."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vlm.errors import ConfigError

COMPARISONS: dict[str, Callable] = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le,
    ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


class Condition(NamedTuple):
    """Such as `year >= 2020`; `comparison` is one of COMPARISONS."""

    column: str
    comparison: str
    value: str | float


def where_all(conditions: Sequence[Condition]) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """The conditions as a filter for `RetrievalIndex.search`.

    It raises a ConfigError where a column of numbers is compared with a text.
    """

    def holds(columns: Mapping[str, np.ndarray]) -> np.ndarray:
        kept = np.True_
        for name, comparison, value in conditions:
            column = columns[name]
            if column.dtype.kind == "U":  # texts are compared as texts
                value = value if isinstance(value, str) else f"{value:g}"
            elif isinstance(value, str) and column.dtype.kind != "O":
                raise ConfigError(f"the numbers of {name!r} are compared with the text {value!r}")
            try:
                kept = kept & np.asarray(COMPARISONS[comparison](column, value), bool)
            except TypeError:  # texts and numbers in one column have no order
                raise ConfigError(
                    f"{name!r} holds texts and numbers, which {comparison} cannot order: "
                    "compare them with = or !="
                ) from None
        return np.asarray(kept)

    return holds
