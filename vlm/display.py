"""Rendering of results: thumbnails and score bars, in notebooks (HTML) and terminals (rich).

Colours are translucent or inherited, so that they work on light and dark pages.
"""

import base64
import contextlib
import html
import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from PIL import Image
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from vlm.errors import DataError
from vlm.inputs.opening import MAX_PIXELS, open_image

escape = html.escape

# Categorical colours, safe for colour blindness (Okabe and Ito).
COLOURS = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167),
    (86, 180, 233), (213, 94, 0), (240, 228, 66), (120, 120, 120),
)  # fmt: skip


def data_uri(image: Any, size: int = 96) -> str:
    """Encode `image`, at most `size` pixels on a side, as a WebP `data:` URI."""
    return "data:image/webp;base64," + base64.b64encode(webp(image, size)).decode()


def reduced(
    image: Any, size: int, max_pixels: int = MAX_PIXELS, max_bytes: int | None = None
) -> Image.Image:
    """Open `image`, at most `size` pixels on a side; JPEG files are decoded reduced.

    Raises:
        DataError: see `vlm.inputs.open_image`.
    """

    def smallest(width: int, height: int) -> tuple[int, int]:
        scale = min(1.0, 2 * size / max(width, height))  # twice the size: sharper once reduced
        return max(1, round(width * scale)), max(1, round(height * scale))

    picture = open_image(
        image, max_pixels=max_pixels, max_bytes=max_bytes, smallest=smallest
    ).copy()
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    return picture


def webp(
    image: Any, size: int, max_pixels: int = MAX_PIXELS, max_bytes: int | None = None
) -> bytes:
    """Encode `image`, at most `size` pixels on a side, as WebP.

    Raises:
        DataError: see `vlm.inputs.open_image`.
    """
    out = io.BytesIO()
    reduced(image, size, max_pixels, max_bytes).save(out, "WEBP", quality=88, method=4)
    return out.getvalue()


def thumbnail(image: Any, size: int = 96) -> str:
    """Make an `<img>` of the image, or an empty string if it cannot be read."""
    try:
        uri = data_uri(image, size)
    except (DataError, OSError, ValueError):
        return ""
    style = f"width:{size}px;height:{size}px;object-fit:contain;border-radius:6px"
    return f'<img src="{uri}" alt="" style="{style}">'


def bars(rows: Sequence[tuple[str, float]], scale: float = 1.0) -> str:
    """Make HTML lines of label, score and a bar of length score / scale."""
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
    """Make an HTML card: an optional image beside its body."""
    return (
        '<div style="display:inline-flex;gap:10px;align-items:center;margin:6px 14px 6px 0">'
        f"{picture}<div>{body}</div></div>"
    )


def facts(title: str, rows: Mapping[str, str]) -> str:
    """Make an HTML table of names and values under a title."""
    lines = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in rows.items()
    )
    return f"<table><caption>{escape(title)}</caption>{lines}</table>"


class FactSheet:
    """Mixin for display as a small table; `_facts` returns its title and rows."""

    def _facts(self) -> tuple[str, dict[str, str]]:
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return facts(*self._facts())

    def __rich__(self) -> Table:
        return facts_table(*self._facts())


def clock(seconds: float) -> str:
    """Format a duration as minutes:seconds, or hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def listed(names: Sequence[str], most: int = 6) -> str:
    """Format the count of names and the first `most` of them."""
    shown = ", ".join(names[:most])
    return f"{len(names):,}: {shown}{', ...' if len(names) > most else ''}"


# --------------------------------------------------------------------------- in a terminal


def bar(share: float, width: int = 20) -> str:
    """Draw a bar of block characters, `share` of `width` long."""
    eighths = round(8 * width * min(max(share, 0.0), 1.0))
    full, rest = divmod(eighths, 8)
    return "█" * full + (chr(0x2590 - rest) if rest else "")


def bar_table(rows: Iterable[tuple[str, float]], scale: float = 1.0) -> Table:
    """Make a table of label, score and bar, for `rich.print`."""
    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold")
    table.add_column(justify="right", style="dim")
    table.add_column(style="blue", no_wrap=True)
    for label, score in rows:
        table.add_row(Text(label), f"{score:.3f}", bar(score / scale if scale else 0.0))
    return table


def number_table(*names: str, text: int = 1) -> Table:
    """Make an empty table with `text` columns of text, then right-aligned columns of numbers."""
    table = Table(*names[:text])
    for name in names[text:]:
        table.add_column(name, justify="right")
    return table


def facts_table(title: str, rows: Mapping[str, str]) -> Table:
    """Make a table of names and values under a title, for `rich.print`."""
    table = Table(title=Text(title), title_justify="left", show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(Text(name, style="dim"), Text(value))
    return table


def as_html(renderable: RenderableType, width: int = 110) -> str:
    """Render a rich object as HTML, with the colours of the page."""
    from rich.console import Console

    console = Console(record=True, width=width, file=io.StringIO(), force_jupyter=False)
    console.print(renderable)
    text = console.export_html(inline_styles=True, code_format="{code}")
    return f'<pre style="line-height:1.3;white-space:pre">{text}</pre>'


# ------------------------------------------------------------------------------- progress bars


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook, which can show pictures.

    Example:
        >>> vlm.callbacks.in_notebook()
        False
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


@contextlib.contextmanager
def progress_bar(
    what: str, inputs: Any = None, *, shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """Context manager: a function that advances a progress bar by a number of items.

    The bar is on stderr if that is a terminal, and in the output of the cell in a notebook. Unless
    `inputs` are a list or tuple, whose length is the total, it counts.
    """
    total = len(inputs) if isinstance(inputs, list | tuple) else None
    if not shown:
        yield lambda count: None
    elif in_notebook():
        yield _notebook_bar(what, total)
    else:
        with _terminal_bar(what, total) as advance:
            yield advance


@contextlib.contextmanager
def _terminal_bar(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
    with Progress(*columns, Remaining(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def _notebook_bar(what: str, total: int | None) -> Callable[[int], None]:
    from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]

    started, done = time.perf_counter(), 0

    def picture() -> Any:
        limits = "" if total is None else f' value="{done}" max="{total}"'
        of = "" if total is None else f" of {total:,}"
        rate = done / max(time.perf_counter() - started, 1e-9)
        return HTML(f"{escape(what)} <progress{limits}></progress> {done:,}{of}, {rate:,.1f}/s")

    handle = display(picture(), display_id=True)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if handle is not None:
            handle.update(picture())

    return advance
