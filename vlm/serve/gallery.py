"""The items of an index as a page shows them: by number, with their pictures made small."""

import itertools
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from vlm.display import webp
from vlm.errors import DataError
from vlm.heads.filters import Condition, where_all
from vlm.heads.query import Query
from vlm.heads.retrieval import Hits, RetrievalIndex
from vlm.inputs.opening import SUFFIXES
from vlm.serve.limits import Refused
from vlm.serve.protocol import Column, Found, IndexAnswer

SIZES = (64, 128, 256, 512, 1024, 2048)  # of pictures, in pixels on the long side
KEPT_BYTES = 64 << 20  # of pictures that were asked for
FEW_VALUES = 50  # of a column that a page offers to choose among
FIRST = 60  # items to begin with


class Gallery:
    """An index that is not changed while it is served; `name` is what the page calls it."""

    def __init__(self, index: RetrievalIndex, name: str, max_pixels: int):
        self.index, self.name, self._max_pixels = index, name, max_pixels
        self.ids = index.ids
        self._numbers = {id: number for number, id in enumerate(self.ids)}
        self._pictures: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._held, self._lock = 0, threading.Lock()
        self.about = self._describe()

    def id(self, number: int) -> str | int:
        """The id of an item.

        Raises:
            Refused: there is no such item (404).
        """
        if not 0 <= number < len(self.ids):
            raise Refused(
                f"there is no item {number:,}: the index has 0 to {len(self.ids) - 1:,}",
                404,
                "no_item",
            )
        return self.ids[number]

    def search(
        self, query: Any, k: int, conditions: list[Condition], min_score: float | None, without: Any
    ) -> Hits:
        """The nearest items to a query, best first, without the items it was made of."""
        where = where_all(conditions) if conditions else None
        k = min(k + len(without), len(self.ids))
        hits: Any = self.index.search(query, k, where=where, min_score=min_score)
        left = {self.ids[number] for number in without}
        return Hits(hit for hit in hits if hit.id not in left)

    def term(self, number: int, weight: float) -> Query:
        """An item as a part of a query."""
        return Query(self.index.embeddings([self.id(number)])[0], weight)

    def found(self, id: str | int, score: float) -> Found:
        """An item as answers show it."""
        number = self._numbers[id]
        return Found(
            item=number,
            id=_printable(id),
            score=score,
            picture=self.file(number) is not None,
            metadata={n: _printable(v) for n, v in self.index.metadata(id).items()},
        )

    def file(self, number: int) -> Path | None:
        """The picture of an item, if its id is the path of one on this disk."""
        id = self.id(number)
        if isinstance(id, str) and os.path.splitext(id)[1].lower() in SUFFIXES:
            return Path(id)
        return None

    def picture(self, number: int, size: int) -> bytes:
        """The picture of an item as WebP, at most as large as the next of `SIZES`.

        Raises:
            Refused: it has none that can be read (404).
        """
        size = next((known for known in SIZES if known >= size), SIZES[-1])
        with self._lock:
            if (kept := self._pictures.get((number, size))) is not None:
                self._pictures.move_to_end((number, size))
                return kept
        file = self.file(number)
        try:
            if file is None:
                raise DataError(f"item {number:,} is not a picture on this disk")
            made = webp(file, size, self._max_pixels)
        except DataError as error:
            raise Refused(str(error), 404, "no_picture") from None
        with self._lock:
            if (number, size) not in self._pictures:
                self._held += len(made)
            self._pictures[number, size] = made
            while self._held > KEPT_BYTES:
                self._held -= len(self._pictures.popitem(last=False)[1])
        return made

    def _describe(self) -> IndexAnswer:
        columns = [_column(name, values) for name, values in self.index.columns.items()]
        step = max(1, len(self.ids) // FIRST)
        first = [self.found(id, 0.0) for id in itertools.islice(self.ids, 0, FIRST * step, step)]
        return IndexAnswer(
            name=self.name,
            model=self.index.model.name,
            count=len(self.ids),
            columns=[column for column in columns if column is not None],
            first=first,
        )


def _column(name: str, values: list[Any]) -> Column | None:
    """What a page can filter a column by; None if all its values are missing."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    distinct = sorted(set(known), key=lambda value: (isinstance(value, str), value))
    is_text = any(isinstance(value, str) for value in known)
    few = [_printable(value) for value in distinct] if len(distinct) <= FEW_VALUES else None
    if is_text:
        return Column(name=name, kind="text", values=few)
    return Column(
        name=name,
        kind="number",
        values=few,
        least=float(distinct[0]),
        most=float(distinct[-1]),
    )


def _printable(value: Any) -> Any:
    """A text as UTF-8 can hold it: the name of a file may be no valid text."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
