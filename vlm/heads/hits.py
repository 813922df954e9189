"""Search results, and their display in notebooks and terminals."""

import os
from typing import NamedTuple

from rich.table import Table

from vlm import display
from vlm.heads.items import Id
from vlm.inputs.opening import SUFFIXES


class Hit(NamedTuple):
    """Search result: the id of an item, and its cosine with the query."""

    id: Id
    score: float


class Hits(list[Hit]):
    """Search results of one query, best first."""

    def _repr_html_(self) -> str:
        cards = [
            display.card(picture_of(hit.id), display.bars([(str(hit.id), hit.score)]))
            for hit in self
        ]
        return f"<div>{''.join(cards) or 'no hits'}</div>"

    def __rich__(self) -> Table:
        return display.bar_table((str(hit.id), hit.score) for hit in self)


def picture_of(id: Id) -> str:
    """Make the `<img>` of an item whose id is an image path; empty for other ids."""
    on_disk = isinstance(id, str) and os.path.splitext(id)[1].lower() in SUFFIXES
    return display.thumbnail(id) if on_disk else ""
