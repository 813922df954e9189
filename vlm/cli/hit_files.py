"""The image files of search hits: open them, copy them, or draw them on a contact sheet."""

import filecmp
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vlm.display import reduced
from vlm.errors import ConfigError, DataError
from vlm.paths import as_path, is_remote

CELL, GAP, LINE = 240, 12, 18  # pixels of a contact sheet


def files_of(hits: Sequence[Any], option: str) -> list[str]:
    """Return the paths of hits.

    Raises:
        DataError: an id is not a file; the message names the option that needs one.
    """
    for hit in hits:
        if not isinstance(hit.id, str) or not as_path(hit.id).exists():
            raise DataError(f"{option} needs the files of the hits, and {hit.id!r} is not a file")
    return [hit.id for hit in hits]


def open_files(files: Sequence[str]) -> None:
    """Open files with the system's viewer.

    Raises:
        ConfigError: there is none.
    """
    if sys.platform == "win32":
        for file in files:
            os.startfile(file)
        return
    program = "open" if sys.platform == "darwin" else "xdg-open"
    if shutil.which(program) is None:
        raise ConfigError(
            f"--open needs the program {program}, which is not installed: install xdg-utils, or "
            "write a contact sheet with --sheet FILE.png"
        )
    # macOS opens all files in one window; xdg-open takes one file.
    for group in [list(files)] if program == "open" else [[file] for file in files]:
        null = subprocess.DEVNULL
        subprocess.Popen(
            [program, *group], stdin=null, stdout=null, stderr=null, start_new_session=True
        )


def copy_files(files: Sequence[str], out: str) -> int:
    """Copy files into a folder, which is created if missing; return the number of new copies.

    A file with the name of another one gets a number. A file that is there already is not copied
    again.
    """
    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    new = 0
    for file in files:
        source, target, number = as_path(file), folder / os.path.basename(file), 1
        while target.exists() and not _same(file, target):
            number += 1
            target = folder / f"{source.stem}-{number}{source.suffix}"
        if not target.exists():
            if is_remote(file):
                target.write_bytes(source.read_bytes())
            else:
                shutil.copy2(file, target)
            new += 1
    return new


def contact_sheet(hits: Sequence[Any], title: str) -> Image.Image:
    """Draw hits as a grid of pictures, each with its score and file name, under a title."""
    columns = max(1, math.ceil(math.sqrt(len(hits))))
    rows = max(1, math.ceil(len(hits) / columns))
    width = columns * (CELL + GAP) + GAP
    height = rows * (CELL + GAP + 2 * LINE) + GAP + 2 * LINE
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(16), ImageFont.load_default(13)
    draw.text((GAP, GAP), _fitted(title, large, width - 2 * GAP), "black", large)
    for number, hit in enumerate(hits):
        row, column = divmod(number, columns)
        left = GAP + column * (CELL + GAP)
        top = GAP + 2 * LINE + row * (CELL + GAP + 2 * LINE)
        try:
            picture = reduced(str(hit.id), CELL)
            place = (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2)
            sheet.paste(picture, place)
        except (DataError, OSError):
            draw.rectangle((left, top, left + CELL, top + CELL), "lightgrey")
        name = _fitted(os.path.basename(str(hit.id)), small, CELL)
        draw.text((left, top + CELL + 2), name, "black", small)
        draw.text((left, top + CELL + LINE), f"{hit.score:.3f}", "grey", small)
    return sheet


def _fitted(text: str, font: Any, width: int) -> str:
    """Shorten a text in its middle until it is at most `width` pixels long."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    kept = len(text)
    shown = text
    while kept > 2 and font.getlength(shown) > width:
        kept -= 1
        shown = f"{text[: kept // 2]}...{text[len(text) - (kept - kept // 2) :]}"
    return shown


def _same(file: str, target: Path) -> bool:
    if is_remote(file):
        return as_path(file).read_bytes() == target.read_bytes()
    return filecmp.cmp(file, target, shallow=False)
