"""Rows of JSON files: JSON Lines, a list of objects, or COCO captions.

COCO's `captions_val2017.json` lists images and annotations; an image has several captions.
Karpathy's splits (`dataset_coco.json`, `dataset_flickr30k.json`) list images with their sentences.
"""

import collections
import json
from typing import Any

from vlm.data.faults import BadSample
from vlm.errors import DataError
from vlm.paths import lines_of

Row = dict[str, Any]


def read_json_rows(text: str, where: str) -> list[tuple[int, Row] | BadSample]:
    """Parse rows with the number of their line or item; a broken line is a bad sample."""
    start, found = text.lstrip()[:1], []
    if start == "[":
        try:
            items = json.loads(text)
        except ValueError as error:
            raise DataError(f"{where} is not JSON ({error}): write it again") from None
        return [_row(item, number, where, "item") for number, item in enumerate(items, 1)]
    if start == "{":
        try:
            data = json.loads(text)
        except ValueError:  # several lines
            data = {}
        if isinstance(data.get("images"), list):
            rows = _with_sentences(data) if "annotations" not in data else _coco(data, where)
            return list(enumerate(rows, 1))
    for number, line in enumerate(lines_of(text), 1):
        if line.strip():
            try:
                found.append(_row(json.loads(line), number, where, "line"))
            except ValueError as error:
                why = f"line {number} of {where} is not JSON: {error}"
                found.append(BadSample("broken row", f"line {number} of {where}", why))
    return found


def _row(item: Any, number: int, where: str, unit: str) -> tuple[int, Row] | BadSample:
    if isinstance(item, dict):
        return number, item
    why = f"{unit} {number} of {where} is not an object with named fields"
    return BadSample("broken row", f"{unit} {number} of {where}", why)


def _coco(data: Row, where: str) -> list[Row]:
    """Make a row for each image, with the captions of its annotations."""
    captions = collections.defaultdict(list)
    try:
        for annotation in data["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        return [
            {**image, "image": image["file_name"], "caption": captions[image["id"]]}
            for image in data["images"]
        ]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{where} has images and annotations without {error}: name COCO's captions_*.json"
        ) from None


def _with_sentences(data: Row) -> list[Row]:
    """Make a row for each image of Karpathy's splits; other rows are unchanged."""
    return [
        {
            **image,
            "image": "/".join(filter(None, (image.get("filepath"), image["filename"]))),
            "caption": [sentence["raw"] for sentence in image["sentences"]],
        }
        if isinstance(image, dict) and {"filename", "sentences"} <= image.keys()
        else image
        for image in data["images"]
    ]
