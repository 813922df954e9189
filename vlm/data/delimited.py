"""Rows of CSV and TSV texts, with or without quotes around fields.

RFC 4180 quotes a field that holds a delimiter or a line break. Tables from the web (CC3M, CC12M)
are not quoted: a caption that begins with a quotation mark would swallow the rows up to the next.
Where it makes a difference the text is read both ways, the rows of each are counted, and the better
reading is taken and logged.
"""

import csv
import io
import logging
from collections.abc import Sequence
from typing import NamedTuple

from vlm.data.faults import BadSample
from vlm.inputs.opening import SUFFIXES
from vlm.paths import lines_of

_HOLD = "quotation marks hold fields"
_MOSTLY = 10  # lines whose quotation marks fit, to one whose do not

_log = logging.getLogger(__name__)


class Line(NamedTuple):
    """The fields of a row, and the number of its first line in the file."""

    number: int
    fields: list[str]


class Reading:
    """The rows that one way of reading makes of a text.

    `bad` of them have another number of fields than the first. Where each line is read by itself,
    `enclosed` lines have a field between quotation marks.
    """

    def __init__(self, rows: list[Line], how: str, enclosed: int = 0):
        self.rows, self.how, self.enclosed = rows, how, enclosed
        self.bad = sum(len(row.fields) != len(rows[0].fields) for row in rows)


def read_delimited(text: str, delimiter: str, where: str) -> list[Line | BadSample]:
    """The rows of a text; one that has another number of fields than the first is a bad sample."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # of captions there is no limit
    reading = _read(text, delimiter, where)
    if not reading.rows:
        return []
    width = len(reading.rows[0].fields)
    return [row if len(row.fields) == width else _broken(row, width, where) for row in reading.rows]


def _broken(row: Line, width: int, where: str) -> BadSample:
    place = f"line {row.number} of {where}"
    why = f"has another number of fields ({len(row.fields)}) than the first ({width})"
    fix = "quote captions that contain the delimiter"
    return BadSample("broken row", place, f"{place} {why}: {fix}")


def _read(text: str, delimiter: str, where: str) -> Reading:
    plain = Reading(_rows(text, delimiter, quoted=False), "quotation marks are part of the text")
    if '"' not in text:
        return plain
    try:
        quoted = Reading(_rows(text, delimiter, quoted=True), _HOLD)
    except csv.Error:  # one that is not closed, or text behind one that is
        quoted = _line_by_line(text, delimiter)
    chosen = plain if _is_better(plain, quoted, delimiter) else quoted
    if len(plain.rows) != len(quoted.rows) or chosen.bad or quoted.how != _HOLD:
        other = quoted if chosen is plain else plain
        _log.warning(
            "%s is read as %s rows, %s of them broken (%s), not as %s rows, %s broken (%s)",
            where, f"{len(chosen.rows):,}", f"{chosen.bad:,}", chosen.how,
            f"{len(other.rows):,}", f"{other.bad:,}", other.how,
        )  # fmt: skip
    return chosen


def _is_better(plain: Reading, quoted: Reading, delimiter: str) -> bool:
    if plain.bad < quoted.bad and _MOSTLY * quoted.bad < quoted.enclosed:
        return False  # quotation marks are well used but for a few
    if plain.bad != quoted.bad or len(plain.rows) <= len(quoted.rows):
        return plain.bad < quoted.bad
    # As many fields in each line as in the first, though some lines lie between quotation marks.
    for reading in (plain, quoted):
        if _names_images(reading.rows[1:]):
            return reading is plain
    return delimiter == "\t"  # which by its standard has no quotes


def _names_images(rows: Sequence[Line]) -> bool:
    """Whether one column holds the name of an image file in every row."""
    columns = zip(*(row.fields for row in rows), strict=False)
    return any(all(field.lower().endswith(tuple(SUFFIXES)) for field in own) for own in columns)


def _rows(text: str, delimiter: str, *, quoted: bool) -> list[Line]:
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    rows, start = [], 1
    for fields in reader:
        if fields:  # a blank line is none
            rows.append(Line(start, fields))
        start = reader.line_num + 1
    return rows


def _line_by_line(text: str, delimiter: str) -> Reading:
    """Each line by itself; one whose quotation marks do not fit is a row of one broken field."""
    rows, enclosed = [], 0
    for number, line in enumerate(lines_of(text), 1):
        fields = line.split(delimiter)
        if any(field.startswith('"') for field in fields):
            try:
                fields = next(csv.reader([line], delimiter=delimiter, strict=True))
                enclosed += 1
            except csv.Error:
                fields = [line]
        if line:
            rows.append(Line(number, fields))
    return Reading(rows, "quotation marks hold fields of one line", enclosed)
