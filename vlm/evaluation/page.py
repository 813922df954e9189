"""HTML pages of reports: the frame around sections."""

from collections.abc import Sequence
from html import escape

from vlm._html import render


def page(title: str, lead: str, sections: Sequence[str], foot: Sequence[str]) -> str:
    """A whole HTML document, with nothing in it that a browser would have to fetch.

    Args:
        title: plain text, of the window and the first heading.
        lead: plain text under it.
        sections: HTML.
        foot: plain texts, one paragraph each.
    """
    return render("page.html", title=title, lead=lead, sections=sections, footnotes=foot)


def section(title: str, note: str, body: str) -> str:
    """A heading, a line of plain text under it, and HTML; nothing at all without a body."""
    if not body:
        return ""
    note = f'<p class="soft">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{note}{body}</section>"
