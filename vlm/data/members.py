"""Features of an example that consists of several files: members of a tar, or files of a folder.

This module defines the meaning of feature names in a config. The files of an example share a name
and differ in their extension: everything after the first dot in a tar, or after the last dot in a
folder.

- A text file is a feature under its extension: `txt`, `re.txt`.
- The fields of `json` are features under their own names; `json/caption` is always the field.
- `caption`, the default of `data.captions`, also names the content of `txt`, as in img2dataset.
  If the JSON has a field `caption` too, the two must agree (a list must contain the text, and is
  then used). An example where they differ is a bad sample: name `txt` or `json/caption`.
- `data.image`, by default `image`, is the only image, or the only one with a simple extension
  (`jpg` beside `mask.png`). Any other name selects one file: `mask.png` or `mask`.
- If the image has a longer extension (in a tar, `photo.v2.jpg` has `v2.jpg`), files with the same
  prefix (`v2.txt`, `v2.json`) can also be named without it.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

from vlm.config import DataConfig
from vlm.data.examples import AMBIGUOUS, Example, wanted_features
from vlm.data.faults import BadSample
from vlm.inputs.folders import is_image_name
from vlm.paths import lines_of

CAPTION, TEXT, FIELDS = "caption", "txt", "json"


def reads(config: DataConfig) -> Callable[[str], bool]:
    """Return a predicate for the extensions of the files to read."""
    return functools.partial(_reads, frozenset([TEXT, FIELDS, *wanted_features(config)]))


@functools.lru_cache(4096)  # called for every member
def _reads(wanted: frozenset[str], extension: str) -> bool:
    return extension in wanted or extension.rpartition(".")[2] in wanted or is_image(extension)


@functools.lru_cache(4096)
def is_image(extension: str) -> bool:
    """Whether this is the extension of an image file."""
    return is_image_name(f"x.{extension}")


def image_of(parts: dict[str, bytes | None], config: DataConfig, where: str) -> str:
    """Return the extension of the image of an example; BadSample unless one fits `data.image`."""
    images = [extension for extension in parts if is_image(extension)]
    if not images:
        why = f"{where} has no image: it has {_listed(parts)}"
        raise BadSample("no image", where, why)
    named = [e for e in images if config.image in (e, e.rpartition(".")[0])]
    if not named and config.image == "image":
        named = [e for e in images if "." not in e] or images
    if not named:
        why = f"{where} has no image {config.image!r} that data.image names: it has"
        raise BadSample("no image", where, f"{why} {_listed(parts)}")
    if len(named) > 1:
        why = f"{where} has several images, {_listed(named)}: name one of them with data.image"
        raise BadSample("several images", where, why)
    return named[0]


def texts_of(
    parts: dict[str, bytes | None], config: DataConfig, where: str, *, by_line: bool = False
) -> Example:
    """Read the features in the files beside an image; `by_line`: text files have one per line.

    BadSample if a text or JSON file is invalid, or there are two different captions.
    """
    example: Example = {}
    try:
        if parts.get(FIELDS) is not None:
            example = _fields(parts[FIELDS] or b"")
        fields = dict(example)
        for extension, data in parts.items():
            if data is None or is_image(extension):
                example.setdefault(extension, b"")  # listed, but not read
            elif extension != FIELDS:
                text = data.decode("utf-8-sig").strip()
                example[extension] = _lines(text) if by_line else text
    except (ValueError, RecursionError) as error:  # of JSON and of UTF-8
        why = f"the text of {where} cannot be read: {error}"
        raise BadSample("broken text", where, why) from None
    wanted = wanted_features(config)
    if TEXT in parts and CAPTION not in parts:
        field, text = fields.get(CAPTION), example[TEXT]
        if field == text:
            pass
        elif isinstance(field, list) and len(field) > 1 and set(_lines(text)) <= set(_lines(field)):
            pass  # the list contains the text
        elif not field or _lines(field) == _lines(text):
            example[CAPTION] = text
        elif CAPTION in wanted:
            raise BadSample(
                AMBIGUOUS,
                where,
                f"{where} has one caption in its txt ({_short(text)}) and another in its JSON "
                f"({_short(field)}): name txt or json/caption in data.captions",
            )
    for name in wanted:
        if "/" in name and name not in example:
            value: Any = {FIELDS: fields, **fields}
            for step in name.split("/"):
                value = value.get(step) if isinstance(value, dict) else None
            if value is not None:
                example[name] = value
    return example


def _fields(data: bytes) -> Example:
    fields = json.loads(data.decode("utf-8-sig"))
    if not isinstance(fields, dict):
        raise ValueError("the JSON is not an object with named fields")
    return fields


def _lines(text: Any) -> list[str]:
    texts = text if isinstance(text, list) else [text]
    return [s for t in texts for line in lines_of(str(t)) if (s := line.strip())]


def _short(text: Any) -> str:
    shown = " / ".join(_lines(text))
    return repr(shown if len(shown) < 60 else f"{shown[:57]}...")


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"
