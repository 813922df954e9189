"""The answers to a query, and how they look."""

import os
from typing import NamedTuple

from rich.table import Table

from vlm import display
from vlm.heads.items import Id
from vlm.inputs.opening import SUFFIXES


class Hit(NamedTuple):
    """One answer: the id it was added under, and its cosine with the query."""

    id: Id
    score: float


class Hits(list[Hit]):
    """The answers to one query, best first."""

    def _repr_html_(self) -> str:
        cards = [
            display.card(picture_of(hit.id), display.bars([(str(hit.id), hit.score)]))
            for hit in self
        ]
        return f"<div>{''.join(cards) or 'no hits'}</div>"

    def __rich__(self) -> Table:
        return display.bar_table((str(hit.id), hit.score) for hit in self)


def picture_of(id: Id) -> str:
    """The `<img>` of an item that is named by its picture's path, or nothing."""
    on_disk = isinstance(id, str) and os.path.splitext(id)[1].lower() in SUFFIXES
    return display.thumbnail(id) if on_disk else ""
