"""Filters on columns of texts, of numbers and of both."""

import numpy as np
import pytest

from vlm.errors import ConfigError
from vlm.heads.filters import Condition, where_all

COLUMNS = {
    "year": np.array([2019, 2020, 2021]),
    "licence": np.array(["cc-by", "cc0", "7"]),
    "any": np.array(["red", 3.0, None], dtype=object),
    "modified": np.array([np.nan, 1_700_000_000e9, 1_714_550_400e9]),  # 2024-05-01 08:00 UTC
}


@pytest.mark.parametrize(
    ("conditions", "kept"),
    [
        ([], True),
        ([("year", ">=", 2020.0)], [False, True, True]),
        ([("year", "<", 2020.0)], [True, False, False]),
        ([("year", "!=", 2020.0), ("licence", "=", "cc-by")], [True, False, False]),
        ([("licence", ">", "cc-by")], [False, True, False]),
        ([("licence", "=", 7.0)], [False, False, True]),  # a text that looks like a number
        ([("any", "=", "red")], [True, False, False]),
        ([("any", "!=", 3.0)], [True, False, True]),
        ([("modified", ">=", "2024-05-01T08:00Z")], [False, False, True]),
        ([("modified", ">", "2024-05-01T08:00Z")], [False, False, False]),
        ([("modified", "<", "2024-05-01T10:00+02:00")], [False, True, False]),
        ([("modified", "<", "2024-06-01")], [False, True, True]),
    ],
)
def test_all_must_hold(conditions, kept):
    holds = where_all([Condition(*condition) for condition in conditions])
    np.testing.assert_array_equal(holds(COLUMNS), kept)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (("year", "=", "red"), "the numbers of 'year' are compared with the text 'red'"),
        (("modified", "=", "red"), "times of 'modified' are compared with 'red': give a date"),
        (("modified", "=", "9999-12-31T23:59-23:59"), "give a date"),
        (("any", "<", 3.0), "'any' holds texts and numbers, which < cannot order"),
    ],
)
def test_comparisons_without_an_order_are_refused(condition, message):
    with pytest.raises(ConfigError, match=message):
        where_all([Condition(*condition)])(COLUMNS)
