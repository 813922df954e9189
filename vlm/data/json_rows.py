"""Rows of JSON files: JSON Lines, a list of objects, or COCO's; and Flickr30k's list of captions.

COCO's `captions_val2017.json` lists images and annotations; an image has several captions. In
`instances_val2017.json` an image has a list `category` with the name of each class that it shows.
Karpathy's splits (`dataset_coco.json`, `dataset_flickr30k.json`) list images with their sentences.
Flickr30k's `results_20130124.token` has a line for each caption: `36979.jpg#0`, a tab, the text.
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
    """Make a row for each image, with the captions or the classes of its annotations."""
    found = collections.defaultdict(list)
    try:
        classes = {category["id"]: category["name"] for category in data.get("categories") or ()}
        captions = any("caption" in annotation for annotation in data["annotations"]) or not classes
        for annotation in data["annotations"]:
            value = annotation["caption"] if captions else classes[annotation["category_id"]]
            found[annotation["image_id"]].append(value)
        name = "caption" if captions else "category"
        return [
            {
                **image,
                "image": image["file_name"],
                name: found[image["id"]] if captions else list(dict.fromkeys(found[image["id"]])),
            }
            for image in data["images"]
        ]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{where} has images and annotations without {error}: name COCO's captions_*.json or "
            "instances_*.json"
        ) from None


def read_token_list(
    text: str, where: str, image: str, caption: str
) -> list[tuple[int, Row] | BadSample]:
    """Parse Flickr30k's list of captions; those of one image are one row."""
    rows: dict[str, tuple[int, Row]] = {}
    bad: list[BadSample] = []
    for number, line in enumerate(lines_of(text), 1):
        name, tab, own = line.partition("\t")
        name, mark, _ = name.rpartition("#")
        if tab and mark and own.strip():
            _, row = rows.setdefault(name, (number, {image: name, caption: []}))
            row[caption].append(own.strip())
        elif line.strip():
            why = f"line {number} of {where} is not IMAGE#NUMBER, a tab and a caption"
            bad.append(BadSample("broken row", f"line {number} of {where}", why))
    return [*rows.values(), *bad]


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
