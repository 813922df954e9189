"""Splits of a data set: the one that is asked for under any of its names, or the one to measure on.

`validation`, `val`, `valid` and `dev` are names of one split. A split that is asked for and is not
there is an error that lists those that are.
"""

import logging
import os
import re
from collections.abc import Collection, Sequence
from typing import Any

from vlm.data.storage import exists, expand, list_files
from vlm.errors import DataError

VALIDATION = ("validation", "val", "valid", "dev")
NAMES = ("train", "test", *VALIDATION)  # a folder of such a name holds a split
WHOLE = "all"  # how a report names a data set without splits

_log = logging.getLogger(__name__)
_PLACE = "{split}"
_BRACES = re.compile(r"\{(?!split\})[^{}]*\}")


def find_split(asked: str, known: Collection[str], where: str) -> str:
    """The name that `where` has for the split `asked`: the same, or another name of it.

    Raises:
        DataError: there is no such split, or several under other names.

    Example:
        >>> from vlm.data.splits import find_split
        >>> find_split("validation", ["train", "val"], "pets")
        'val'
    """
    if asked in known:
        return asked
    found = [name for name in known if _canonical(name) == _canonical(asked)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(sorted(known)) or "none"
    if found:
        raise DataError(
            f"{where} has several splits that {asked!r} may mean: name one of "
            f"{', '.join(sorted(found))}"
        )
    raise DataError(f"{where} has no split {asked!r}: it has {listed}")


def split_value(value: Any) -> str | None:
    """The split that a value in a column `split` names; None for null, NaN and an empty text."""
    return None if value is None or value != value or value == "" else str(value)


def rows_of_split(asked: str, values: Sequence[str | None], where: str) -> list[int]:
    """The numbers of the rows of a split, by the values in a column; rows of none are logged.

    Raises:
        DataError: there is no such split.
    """
    found = find_split(asked, {value for value in values if value}, where)
    if without := values.count(None):
        _log.warning("%s has %s rows of no split, which are left out", where, f"{without:,}")
    return [i for i, value in enumerate(values) if value == found]


def default_split(known: Collection[str], where: str) -> str:
    """The split to measure on where none is asked for: test, else validation, else the only one.

    Raises:
        DataError: there are several, and none of these.
    """
    for wanted in ("test", "validation"):
        if any(_canonical(name) == wanted for name in known):
            return find_split(wanted, known, where)
    if len(known) == 1:
        return next(iter(known))
    raise DataError(
        f"{where} has neither a test nor a validation split to measure on: name a split of it"
        f" ({', '.join(sorted(known)) or 'none could be listed'})"
    )


def split_files(pattern: str, split: str, whole: str) -> list[str]:
    """The files of a split: `{split}` in the pattern stands for its name.

    Files that a pattern without `{split}` names are the split `whole`.

    Raises:
        DataError: no such split, no files, or files of several splits and no `{split}`.
    """
    if _PLACE not in pattern:
        files = expand(pattern)
        if split != whole:
            raise DataError(
                f"data.source {pattern!r} has no {{split}} in it, so there is no split {split!r}: "
                "name the files by split, or set eval_split=None"
            )
        found = sorted({name for file in files if (name := _split_in(file)) is not None})
        if len({_canonical(name) for name in found}) > 1:
            raise DataError(
                f"data.source {pattern!r} names files of several splits ({', '.join(found)}): put "
                "{split} where the name of the split is"
            )
        return files
    files = _existing(pattern.replace(_PLACE, split))
    if files is None and (known := named_splits(pattern)):
        return expand(pattern.replace(_PLACE, find_split(split, known, pattern)))
    if files is None and _canonical(split) == "validation":  # of a server that lists nothing
        names = (pattern.replace(_PLACE, name) for name in VALIDATION)
        files = next(filter(None, map(_existing, names)), None)
    return files or expand(pattern.replace(_PLACE, split))


def named_splits(pattern: str) -> list[str]:
    """The splits of the files that a pattern with `{split}` names; none where they are not listed.

    Example:
        >>> from vlm.data.splits import named_splits
        >>> for name in ("train-000.tar", "val-000.tar"):
        ...     _ = (folder / name).write_bytes(b"")
        >>> named_splits(str(folder / "{split}-{000..099}.tar"))
        ['train', 'val']
    """
    found = set()
    for part in pattern.split("::"):
        if _PLACE not in part:
            continue
        wild = _BRACES.sub("*", os.path.expanduser(part.strip()))
        first, *rest = (_regex(text) for text in wild.split(_PLACE))
        name = re.compile(first + "([^/]+?)" + r"\1".join(rest))
        for file in list_files(wild.replace(_PLACE, "*")):
            if (match := name.fullmatch(file)) is not None:
                found.add(match[1])
    return sorted(found)


def _existing(pattern: str) -> list[str] | None:
    """The files of a pattern; None where the first of them is not there."""
    try:
        files = expand(pattern)
    except DataError:
        return None
    return files if exists(files[0]) else None


def _regex(text: str) -> str:
    return re.escape(text).replace(r"\*", "[^/]*").replace(r"\?", "[^/]")


def _split_in(file: str) -> str | None:
    """The name of a split that a file's name begins with, as in train-00000-of-00002.parquet."""
    first = re.match(r"[A-Za-z]+(?=[-_.])", file.rpartition("/")[2])
    return first[0] if first and _canonical(first[0]) in ("train", "test", "validation") else None


def _canonical(name: str) -> str:
    name = name.lower()
    return "validation" if name in VALIDATION else name
