"""How results look in a notebook: small pictures and bars of scores, as plain HTML.

Colours are translucent or inherited, so that light and dark pages both show them well.
"""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from vlm.errors import DataError
from vlm.inputs.opening import open_image

escape = html.escape


def data_uri(image: Any, size: int = 96) -> str:
    """`image` at most `size` pixels on a side as a `data:` address, WebP encoded."""
    picture = open_image(image)
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=88, method=4)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


def thumbnail(image: Any, size: int = 96) -> str:
    """An `<img>` of the picture, or nothing where it cannot be read: a display never fails."""
    try:
        uri = data_uri(image, size)
    except (DataError, OSError, ValueError):
        return ""
    style = f"width:{size}px;height:{size}px;object-fit:contain;border-radius:6px"
    return f'<img src="{uri}" alt="" style="{style}">'


def bars(rows: Sequence[tuple[str, float]], scale: float = 1.0) -> str:
    """Lines of label, score and a bar as long as score / scale."""
    lines = []
    for label, score in rows:
        width = 100 * min(max(score / scale, 0.0), 1.0) if scale else 0.0
        lines.append(
            '<div style="position:relative;margin:2px 0;padding:1px 6px;min-width:220px">'
            f'<div style="position:absolute;inset:0;width:{width:.1f}%;border-radius:4px;'
            'background:rgba(92,124,250,.28)"></div>'
            '<div style="position:relative;display:flex;justify-content:space-between;gap:16px">'
            f"<span>{escape(label)}</span>"
            f'<span style="font-variant-numeric:tabular-nums;opacity:.75">{score:.3f}</span>'
            "</div></div>"
        )
    return "".join(lines)


def card(picture: str, body: str) -> str:
    """A picture, if there is one, beside its body."""
    return (
        '<div style="display:inline-flex;gap:10px;align-items:center;margin:6px 14px 6px 0">'
        f"{picture}<div>{body}</div></div>"
    )
