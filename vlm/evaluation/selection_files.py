"""Winoground and SugarCrepe, read from their authors' files in the data folder of TFDS.

winoground/examples.jsonl, images/ex_0_img_0.png     from the Hub (facebook/winoground, its
                                                     data/ folder, images.zip unpacked)
sugarcrepe/add_att.json, ..., val2017/000000085329.jpg     from GitHub (RAIVNLab/sugar-crepe,
                                                     its data/ folder), with COCO's images
"""

import json
from typing import Any

from etils import epath

from vlm.errors import DataError
from vlm.evaluation.tasks import DataInfo, SelectionTask
from vlm.paths import as_path, lines_of

# SugarCrepe's seven ways to make a caption wrong (arXiv:2306.14610, table 2).
SUGARCREPE = (
    "add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj",
)  # fmt: skip


def winoground(data_dir: str, name: str) -> SelectionTask:
    """Read Winoground: 400 pairs of images with two captions of equal words (arXiv:2204.03162).

    The paper's text, image and group scores are CLIP_benchmark's `text_acc`, `image_acc` and `acc`.

    Raises:
        DataError: missing or malformed files.
    """
    folder = _folder(data_dir, "winoground")
    file = folder / "examples.jsonl"
    rows = [_parsed(file, line) for line in lines_of(_text(file)) if line.strip()]
    fields = ("image_0", "image_1", "caption_0", "caption_1")
    own = [[_field(file, row, field) for field in fields] for row in rows]
    images = [[_image(folder / "images", f"{n}.png") for n in row[:2]] for row in own]
    return SelectionTask(images, [row[2:] for row in own], DataInfo("winoground"), name)


def sugarcrepe(data_dir: str, category: str, name: str) -> SelectionTask:
    """Read a category of SugarCrepe: COCO captions, each with a wrong one (arXiv:2306.14610).

    The paper's accuracy is `acc` and `text_acc`; `image_acc` is 1, as there is one image.

    Raises:
        DataError: no such category; missing or malformed files.
    """
    if category not in SUGARCREPE:
        raise DataError(f"SugarCrepe has no category {category!r}: it has {', '.join(SUGARCREPE)}")
    folder = _folder(data_dir, "sugarcrepe")
    file = folder / f"{category}.json"
    contents = _parsed(file, _text(file))
    rows = list(contents.values()) if isinstance(contents, dict) else contents
    fields = ("filename", "caption", "negative_caption")
    own = [[_field(file, row, field) for field in fields] for row in rows]
    images = [[_image(folder / "val2017", row[0])] for row in own]
    data = DataInfo("sugarcrepe", split=category)
    return SelectionTask(images, [row[1:] for row in own], data, name)


def _folder(data_dir: str, name: str) -> epath.Path:
    folder = as_path(data_dir) / name
    return folder / "data" if (folder / "data").is_dir() else folder


def _text(file: epath.Path) -> str:
    if not file.is_file():
        raise DataError(f"there is no {file}: put the authors' files there, or set data_dir")
    return file.read_text()


def _parsed(file: epath.Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{file} is not JSON ({error}): fetch it again") from None


def _field(file: epath.Path, row: Any, field: str) -> str:
    value = row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, str):
        raise DataError(f"{file} has an example without the text {field!r}: fetch it again")
    return value


def _image(folder: epath.Path, name: str) -> epath.Path:
    """Check that an image exists, so that incomplete sets are not measured in part."""
    path = folder / name
    if not path.is_file():
        raise DataError(f"there is no image {path}: unpack the data set's images in {folder}")
    return path
