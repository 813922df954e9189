"""Catalogue of known public checkpoints, to choose from.

The rows are in `known_models.csv` and, once for each architecture, in `known_architectures.csv`.
Accuracy is zero-shot ImageNet top-1. Parameters and FLOPs (multiply-adds) are for one image and one
text of full length. A field is empty if no source that we could read gives a value.

A short name is that of the architecture (`ViT-B-32`, `EVA02-B-16`; `siglip2-base`, at its smallest
resolution). It is the most accurate checkpoint of that architecture with an open licence. Names of
other checkpoints add their training data, resolution or patch size (`ViT-B-32-openai`).

Sizes are those of open_clip's docs/model_profile.csv. Parameters that it lacks are counted from
abstract models of vlm or open_clip: tests/weights/test_catalogue.py and
tests/peers/test_catalogue_counts.py.
"""

import csv
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.errors import ConfigError


@dataclass(frozen=True)
class Entry:
    """One checkpoint: its names for `vlm.load`, and the facts to choose it by."""

    name: str
    short_name: str | None
    family: str
    architecture: str
    image_size: int
    context_length: int
    parameters: float | None  # millions
    image_gflops: float | None
    text_gflops: float | None
    languages: str  # names, "multilingual" (languages of its text tower), or "worldwide"
    licence: str | None  # None: its files do not name one
    imagenet: float | None = None  # percent
    source: str | None = None  # of the accuracy


def _read(file: str) -> list[dict[str, Any]]:
    """Return the rows of a table beside this module, with numbers as such and None if empty."""
    kinds = {"image_size": int, "context_length": int}
    kinds |= dict.fromkeys(("parameters", "image_gflops", "text_gflops", "imagenet"), float)
    with (Path(__file__).parent / file).open(newline="") as rows:
        return [
            {name: kinds.get(name, str)(text) if text else None for name, text in row.items()}
            for row in csv.DictReader(rows)
        ]


def _entries() -> tuple[Entry, ...]:
    architectures = {row["architecture"]: row for row in _read("known_architectures.csv")}
    for row in architectures.values():
        del row["note"]
    models = _read("known_models.csv")
    return tuple(Entry(**row | architectures[row["architecture"]]) for row in models)


ENTRIES = _entries()


def resolve(name: str) -> Entry | None:
    """Return the entry of a name, a short name, or a Hub name without its owner; None if unknown.

    Case is ignored; "_", "/" and "-" are equal: `vit_b_32` and `ViT-B/32` are `ViT-B-32`.
    """
    return _NAMED.get(_plain(name))


def find(name: str) -> Entry:
    """Return the entry of a name, as `resolve`.

    Raises:
        ConfigError: there is none; the message lists similar names.
    """
    if (entry := resolve(name)) is not None:
        return entry
    near = similar(name)
    hint = f"; it has {', '.join(near)}" if near else "; see `vlm models` for all"
    raise ConfigError(f"the table of known models has no {name!r}{hint}")


def similar(name: str, most: int = 5) -> list[str]:
    """Return short names, else names, of entries whose names resemble `name`."""
    wanted = _plain(name)
    close = difflib.get_close_matches(wanted, _NAMED, n=3 * most, cutoff=0.75)
    inside = sorted(known for known in _NAMED if len(wanted) > 3 and wanted in known)
    found = [_NAMED[known] for known in (*close, *inside)]
    return list(dict.fromkeys(entry.short_name or entry.name for entry in found))[:most]


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace("/", "-")


def _named() -> dict[str, Entry]:
    """Return the entries by all of their names; names of checkpoints on the Hub have an owner."""
    hub = [entry for entry in ENTRIES if "/" in entry.name]
    named = {_plain(entry.name.partition("/")[2]): entry for entry in hub}
    named |= {_plain(entry.name): entry for entry in ENTRIES}
    return named | {_plain(entry.short_name): entry for entry in ENTRIES if entry.short_name}


_NAMED = _named()

MAX_MEGABYTES, MAX_GFLOPS = 700, 50  # of the default: download in float32, cost of an image


def default_model() -> Entry:
    """Return the default model of the command line.

    It is the checkpoint with the highest published ImageNet accuracy among those with an open
    licence, a size below `MAX_MEGABYTES`, and known image FLOPs of at most `MAX_GFLOPS`.
    """
    fit = [
        entry
        for entry in choose(max_parameters=MAX_MEGABYTES / 4, licence="open")
        if entry.imagenet is not None and (entry.image_gflops or MAX_GFLOPS + 1) <= MAX_GFLOPS
    ]
    return max(fit, key=lambda entry: entry.imagenet or 0.0)


# Codes of the languages of models with few; all others fit every language.
_FEW = {"English": ("en",), "Chinese": ("zh",), "English, Chinese": ("en", "zh")}
OPEN_LICENCES = ("MIT", "Apache-2.0")  # that allow any use of the weights


def choose(
    *,
    max_parameters: float | None = None,
    licence: str | None = None,
    language: str | None = None,
) -> list[Entry]:
    """Return the entries that meet all conditions, in the order of the table.

    Args:
        max_parameters: millions, of both towers together. Entries without a count do not fit, and
            neither do entries without a licence if one is given: see `undecided`.
        licence: a name, or "open" for any of `OPEN_LICENCES`.
        language: a code such as "de". Models with one or two languages fit only those. Multilingual
            models fit every language, because their authors' lists of languages disagree.

    Raises:
        ConfigError: nothing fits, or no entry has that licence.
    """
    licences = {entry.licence for entry in ENTRIES if entry.licence is not None}
    if licence is not None and not licences & {*_names(licence)}:
        raise ConfigError(
            f"no known model has the licence {licence!r}: choose open, "
            + ", ".join(sorted(licences))
        )
    unknown = undecided(max_parameters=max_parameters, licence=licence, language=language)
    matches = [
        entry
        for entry in ENTRIES
        if _fits(entry, max_parameters, licence, language) and entry not in unknown
    ]
    if not matches:
        raise ConfigError("no known model fits all of that: see `vlm models` for what there is")
    return matches


def undecided(
    *,
    max_parameters: float | None = None,
    licence: str | None = None,
    language: str | None = None,
) -> list[Entry]:
    """Return the entries that lack a requested fact, and meet all other conditions."""
    return [
        entry
        for entry in ENTRIES
        if (
            (max_parameters is not None and entry.parameters is None)
            or (licence is not None and entry.licence is None)
        )
        and _fits(entry, max_parameters, licence, language)
    ]


def _fits(
    entry: Entry, max_parameters: float | None, licence: str | None, language: str | None
) -> bool:
    """Return True if no known fact of the entry excludes it."""
    return (
        (max_parameters is None or entry.parameters is None or entry.parameters <= max_parameters)
        and (licence is None or entry.licence is None or entry.licence in _names(licence))
        and (language is None or language in _FEW.get(entry.languages, (language,)))
    )


def _names(licence: str) -> tuple[str, ...]:
    return OPEN_LICENCES if licence == "open" else (licence,)


def table(entries: Sequence[Entry] = ENTRIES) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of a table of entries, as text."""
    columns = ["short name", "model", "family", "architecture", "pixels", "tokens", "M params",
               "GFLOPs image", "GFLOPs text", "languages", "licence", "ImageNet %"]  # fmt: skip
    return columns, [_row(entry) for entry in entries]


def popular() -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of the models with most downloads, by their layout on the Hub."""
    rows = _read("popular_models.csv")
    columns = ["model", "downloads a month", "figure of a", "layout on the Hub", "read"]
    return columns, [
        [r["model"], f"{int(r['downloads']):,}", r["figure_from"], r["layout"], r["reads"]]
        for r in rows
    ]


def _row(e: Entry) -> list[str]:
    def number(x: float | None) -> str:
        return "" if x is None else f"{x:,.1f}"

    return [
        e.short_name or "", e.name, e.family, e.architecture,
        str(e.image_size), str(e.context_length),
        number(e.parameters) or "unknown", number(e.image_gflops), number(e.text_gflops),
        e.languages, e.licence or "unknown", number(e.imagenet),
    ]  # fmt: skip
