"""Splits of a data set: lookup by name with aliases, and the default split for evaluation.

`validation`, `val`, `valid` and `dev` are aliases; so are `train` and `training`, and `test`,
`testing`, `eval` and `evaluation`, as in Hugging Face `datasets`. The error for an unknown split
lists the existing ones.
"""

import logging
import os
import re
from collections.abc import Collection, Sequence
from typing import Any

from vlm.data.layouts import PLACE, files_of, find_layout, has_split_names
from vlm.data.storage import exists, expand, list_files
from vlm.errors import DataError

VALIDATION = ("validation", "val", "valid", "dev")
_ALIASES = {
    **dict.fromkeys(VALIDATION, "validation"),
    "training": "train",
    **dict.fromkeys(("testing", "eval", "evaluation"), "test"),
}
NAMES = ("train", "test", *_ALIASES)  # names of split folders
VALIDATION_SHARE = 0.2  # of each class, where data has no validation split
WHOLE = "all"  # name of a data set without splits in reports

_log = logging.getLogger(__name__)
_BRACES = re.compile(r"\{(?!split\})[^{}]*\}")


def find_split(requested: str, known: Collection[str], where: str) -> str:
    """Find the split `requested` by its name or an alias.

    Raises:
        DataError: there is no such split, or several under other names.

    Example:
        >>> from vlm.data.splits import find_split
        >>> find_split("validation", ["train", "val"], "pets")
        'val'
    """
    if requested in known:
        return requested
    matches = [name for name in known if _canonical(name) == _canonical(requested)]
    if len(matches) == 1:
        return matches[0]
    listed = ", ".join(sorted(known)) or "none"
    if matches:
        raise DataError(
            f"{where} has several splits that {requested!r} may mean: name one of "
            f"{', '.join(sorted(matches))}"
        )
    raise DataError(f"{where} has no split {requested!r}: it has {listed}")


def split_value(value: Any) -> str | None:
    """Convert a value of a column `split` to a name; None for null, NaN and an empty text."""
    return None if value is None or value != value or value == "" else str(value)


def rows_of_split(requested: str, values: Sequence[str | None], where: str) -> list[int]:
    """Return the indices of the rows of a split, by a column; log rows without a split.

    `train+restval` are the rows of both splits.
    """
    known = {value for value in values if value}
    matched = find_splits(requested, known, where)
    if without := values.count(None):
        _log.warning("%s has %s rows of no split, which are left out", where, f"{without:,}")
    if "restval" in known and matched == ["train"]:
        _log.warning(
            "%s has %s more training images in the split restval: data.train_split=%s uses them",
            where, f"{values.count('restval'):,}", "train+restval",
        )  # fmt: skip
    return [i for i, value in enumerate(values) if value in matched]


def find_splits(requested: str, known: Collection[str], where: str) -> list[str]:
    """Find one split, or several that are joined by `+`."""
    parts = [requested] if requested in known else requested.split("+")
    return [find_split(part.strip(), known, where) for part in parts]


def default_split(known: Collection[str], where: str) -> str:
    """Choose the split for evaluation: test, else validation, else the only one."""
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
    """List the files of a split; `{split}` in the pattern is replaced by its name.

    Files of a pattern without `{split}` are the split `whole`. DataError if there is no such split,
    or several splits and no `{split}`.
    """
    layout = find_layout(pattern)
    if layout is not None and has_split_names(pattern):
        names = find_splits(split, list(layout.splits), pattern)
        return [file for name in names for file in layout.splits[name]]
    if not has_split_names(pattern):
        files = files_of(pattern)
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
    files = _existing(pattern.replace(PLACE, split))
    if files is None and (known := named_splits(pattern)):
        return expand(pattern.replace(PLACE, find_split(split, known, pattern)))
    if files is None and _canonical(split) == "validation":  # a web server cannot list files
        names = (pattern.replace(PLACE, name) for name in VALIDATION)
        files = next(filter(None, map(_existing, names)), None)
    return files or expand(pattern.replace(PLACE, split))


def named_splits(pattern: str) -> list[str]:
    """List the splits of a pattern with `{split}`; empty if files cannot be listed.

    Example:
        >>> from vlm.data.splits import named_splits
        >>> for name in ("train-000.tar", "val-000.tar"):
        ...     _ = (folder / name).write_bytes(b"")
        >>> named_splits(str(folder / "{split}-{000..099}.tar"))
        ['train', 'val']
    """
    if (layout := find_layout(pattern)) is not None:
        return list(layout.splits)
    names = set()
    for part in pattern.split("::"):
        if PLACE not in part:
            continue
        wild = _BRACES.sub("*", os.path.expanduser(part.strip()))
        first, *rest = (_regex(text) for text in wild.split(PLACE))
        name = re.compile(first + "([^/]+?)" + r"\1".join(rest))
        for file in list_files(wild.replace(PLACE, "*")):
            if (match := name.fullmatch(file)) is not None:
                names.add(match[1])
    return sorted(names)


def _existing(pattern: str) -> list[str] | None:
    """Expand a pattern; None if the first file is missing."""
    try:
        files = expand(pattern)
    except DataError:
        return None
    return files if exists(files[0]) else None


def _regex(text: str) -> str:
    return re.escape(text).replace(r"\*", "[^/]*").replace(r"\?", "[^/]")


def _split_in(file: str) -> str | None:
    """Return the split that a file name starts with, as in train-00000-of-00002.parquet."""
    first = re.match(r"[A-Za-z]+(?=[-_.])", file.rpartition("/")[2])
    return first[0] if first and _canonical(first[0]) in ("train", "test", "validation") else None


def _canonical(name: str) -> str:
    return _ALIASES.get(name.lower(), name.lower())
