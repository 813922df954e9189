"""PNG of a grid of images with their top captions and scores."""

import os
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vlm.errors import DataError
from vlm.inputs.opening import open_image
from vlm.paths import as_path

# Lengths in pixels, for screens of two pixels per point.
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
PICTURE, PADDING, GAP, RADIUS = 190, 20, 24, 20
TEXT_WIDTH, LINE, FONT = 660, 44, 24
PAGE, CARD, EDGE = (246, 247, 249), (255, 255, 255), (222, 226, 233)
INK, SOFT, GOOD = (23, 26, 33), (93, 101, 117), (43, 138, 62)
BAR, GOOD_BAR = (219, 228, 255), (211, 249, 216)


def gallery_png(
    path: str | os.PathLike,
    images: Sequence[Any],
    top_captions: Sequence[Sequence[tuple[str, float]]],
    right: Sequence[str] | None = None,
    columns: int = 2,
) -> None:
    """Draw images beside their top captions, each on a bar as long as its score, as PNG.

    Text is set in Pillow's own font (Latin letters), so the file is the same on every machine.

    Args:
        path: of the PNG.
        images: PIL images, paths or uint8 arrays.
        top_captions: (caption, score) pairs of each image, best first, such as
            `Classification.top(4)` gives; scores from 0 to 1.
        right: the correct caption of each image, drawn in green.
        columns: of the grid.

    Raises:
        DataError: no images, or not one list of captions per image.
    """
    if not len(images):
        raise DataError("a gallery of no images cannot be drawn: give at least one")
    for what, rows in (("top_captions", top_captions), ("right", right)):
        if rows is not None and len(rows) != len(images):
            raise DataError(f"{len(images)} images and {len(rows)} {what}: give one for each")
    columns = max(1, min(columns, len(images)))
    lines = max(len(rows) for rows in top_captions)
    width = PICTURE + TEXT_WIDTH + 3 * PADDING
    height = max(PICTURE, lines * LINE) + 2 * PADDING
    rows = -(-len(images) // columns)
    size = (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP)
    sheet = Image.new("RGB", size, PAGE)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=FONT)
    for i, (image, captions) in enumerate(zip(images, top_captions, strict=True)):
        left = GAP + (i % columns) * (width + GAP)
        top = GAP + (i // columns) * (height + GAP)
        box = (left, top, left + width - 1, top + height - 1)
        draw.rounded_rectangle(box, RADIUS, fill=CARD, outline=EDGE, width=2)
        picture = open_image(image)
        scale = PICTURE / max(picture.size)
        fitted = [max(1, round(side * scale)) for side in picture.size]
        picture = picture.resize(fitted, Image.Resampling.LANCZOS)
        corner = (
            left + PADDING + (PICTURE - picture.width) // 2,
            top + (height - picture.height) // 2,
        )
        sheet.paste(picture, corner)
        x = left + PICTURE + 2 * PADDING
        y = top + (height - len(captions) * LINE) // 2
        for caption, score in captions:
            is_right = right is not None and caption == right[i]
            _caption_line(draw, font, (x, y), caption, score, is_right)
            y += LINE
    with as_path(path).open("wb") as file:  # also in a bucket
        sheet.save(file, "PNG")


def _caption_line(
    draw: ImageDraw.ImageDraw,
    font: Font,
    corner: tuple[int, int],
    caption: str,
    score: float,
    is_right: bool,
) -> None:
    """Draw one caption on its bar, shortened to fit, and its score at the right end."""
    x, y = corner
    length = round(min(max(score, 0.0), 1.0) * TEXT_WIDTH)
    if length > 2:
        bar = (x, y + 2, x + length, y + LINE - 3)
        draw.rounded_rectangle(bar, min(8, length // 2), fill=GOOD_BAR if is_right else BAR)
    value = f"{score:.2f}"
    room = TEXT_WIDTH - font.getlength(value) - 3 * 10
    draw.text((x + 10, y + LINE // 2), fit(caption, font, room), INK, font, anchor="lm")
    end = (x + TEXT_WIDTH - 8, y + LINE // 2)
    draw.text(end, value, GOOD if is_right else SOFT, font, anchor="rm")


def fit(text: str, font: Font, width: float) -> str:
    """Shorten a text in the middle if it is wider than `width` pixels.

    The ends of a caption are more informative than its middle: the object and its variant.
    """
    if font.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        head = -(-kept // 2)
        tail = text[len(text) - (kept - head) :]
        shorter = f"{text[:head].rstrip()}...{tail.lstrip()}"
        if font.getlength(shorter) <= width:
            return shorter
    return "..."
