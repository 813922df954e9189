"""Rows of CSV and TSV files, with detection of quoting.

RFC 4180 quotes fields that contain a delimiter or a line break. Tables from the web (CC3M, CC12M)
are not quoted, and a caption that begins with a quotation mark would absorb all rows up to the next
one. If it makes a difference, the file is parsed both ways; the parse with fewer broken rows is
used, and the choice is logged.
"""

import csv
import io
import logging
from collections.abc import Sequence
from typing import NamedTuple

from vlm.data.faults import BadSample
from vlm.inputs.opening import SUFFIXES
from vlm.paths import lines_of

_QUOTED = "quotation marks enclose fields"
_MIN_RATIO = 10  # of well quoted lines to broken ones, to prefer the quoted parse

_log = logging.getLogger(__name__)


class Line(NamedTuple):
    """The fields of a row, and the number of its first line in the file."""

    number: int
    fields: list[str]


class Parse:
    """Rows of a file under one assumption about quoting.

    `bad` rows have another number of fields than the first. If lines were parsed separately,
    `enclosed` lines have a quoted field.
    """

    def __init__(self, rows: list[Line], how: str, enclosed: int = 0):
        self.rows, self.how, self.enclosed = rows, how, enclosed
        self.bad = sum(len(row.fields) != len(rows[0].fields) for row in rows)


def read_delimited(text: str, delimiter: str, where: str) -> list[Line | BadSample]:
    """Parse rows; one with another number of fields than the first is a bad sample."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # captions may have any length
    parse = _read(text, delimiter, where)
    if not parse.rows:
        return []
    width = len(parse.rows[0].fields)
    return [row if len(row.fields) == width else _broken(row, width, where) for row in parse.rows]


def _broken(row: Line, width: int, where: str) -> BadSample:
    place = f"line {row.number} of {where}"
    why = f"has another number of fields ({len(row.fields)}) than the first ({width})"
    fix = "quote captions that contain the delimiter"
    return BadSample("broken row", place, f"{place} {why}: {fix}")


def _read(text: str, delimiter: str, where: str) -> Parse:
    plain = Parse(_rows(text, delimiter, quoted=False), "quotation marks are part of the text")
    if '"' not in text:
        return plain
    try:
        quoted = Parse(_rows(text, delimiter, quoted=True), _QUOTED)
    except csv.Error:  # an unclosed quotation mark, or text after a closed one
        quoted = _line_by_line(text, delimiter)
    chosen = plain if _is_better(plain, quoted, delimiter) else quoted
    if len(plain.rows) != len(quoted.rows) or chosen.bad or quoted.how != _QUOTED:
        other = quoted if chosen is plain else plain
        _log.warning(
            "%s is read as %s rows, %s of them broken (%s), not as %s rows, %s broken (%s)",
            where, f"{len(chosen.rows):,}", f"{chosen.bad:,}", chosen.how,
            f"{len(other.rows):,}", f"{other.bad:,}", other.how,
        )  # fmt: skip
    return chosen


def _is_better(plain: Parse, quoted: Parse, delimiter: str) -> bool:
    if plain.bad < quoted.bad and _MIN_RATIO * quoted.bad < quoted.enclosed:
        return False  # most quotation marks enclose fields
    if plain.bad != quoted.bad or len(plain.rows) <= len(quoted.rows):
        return plain.bad < quoted.bad
    # Both parses have equal widths, but some line breaks are between quotation marks.
    for parse in (plain, quoted):
        if _names_images(parse.rows[1:]):
            return parse is plain
    return delimiter == "\t"  # TSV has no quoting by its standard


def _names_images(rows: Sequence[Line]) -> bool:
    """Whether one column has an image file name in every row."""
    columns = zip(*(row.fields for row in rows), strict=False)
    return any(
        all(field.lower().endswith(tuple(SUFFIXES)) for field in column) for column in columns
    )


def _rows(text: str, delimiter: str, *, quoted: bool) -> list[Line]:
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    rows, start = [], 1
    for fields in reader:
        if fields:  # not a blank line
            rows.append(Line(start, fields))
        start = reader.line_num + 1
    return rows


def _line_by_line(text: str, delimiter: str) -> Parse:
    """Parse each line separately; one with unbalanced quotation marks is a single field."""
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
    return Parse(rows, "quotation marks enclose fields of one line", enclosed)
