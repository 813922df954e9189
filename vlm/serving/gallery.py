"""Items of an index for the web page: metadata, filters and thumbnails, by item number."""

import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from vlm.display import webp
from vlm.errors import DataError
from vlm.heads.filters import Condition, where_all
from vlm.heads.query import Query
from vlm.heads.retrieval import RetrievalIndex
from vlm.inputs.opening import SUFFIXES
from vlm.serving.limits import RequestError
from vlm.serving.protocol import Column, Found, IndexAnswer

T = TypeVar("T")

SIZES = (64, 128, 256, 512, 1024, 2048)  # of thumbnails: pixels on the long side
CACHE_BYTES = 64 << 20  # of thumbnails
MAX_CHOICES = 50  # distinct values of a column that the page lists in a menu
FIRST = 60  # items on the start page


class Gallery:
    """Read-only view of an index; `name` is its title on the page."""

    def __init__(self, index: RetrievalIndex, name: str, max_pixels: int):
        self.index, self.name, self._max_pixels = index, name, max_pixels
        self.ids = index.ids
        self._numbers = {id: number for number, id in enumerate(self.ids)}
        self._thumbnails: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._cached_bytes, self._lock = 0, threading.Lock()
        self.about = self._describe()

    def id(self, number: int) -> str | int:
        """Return the id of an item.

        Raises:
            RequestError: there is no such item (404).
        """
        if not 0 <= number < len(self.ids):
            raise RequestError(
                f"there is no item {number:,}: item numbers are 0 to {len(self.ids) - 1:,}",
                404,
                "no_item",
            )
        return self.ids[number]

    def search(
        self, query: Any, k: int, conditions: list[Condition], min_score: float | None, without: Any
    ) -> list[Found]:
        """Return the nearest items to a query, best first, without the query's own items."""
        where = where_all(conditions) if conditions else None
        k = min(k + len(without), len(self.ids))
        hits: Any = self.index.search(query, k, where=where, min_score=min_score)
        excluded = {self.ids[number] for number in without}
        return [self.found(*hit) for hit in hits if hit.id not in excluded]

    def term(self, number: int, weight: float) -> Query:
        """Return an item as a term of a query."""
        return Query(self.index.embeddings([self.id(number)])[0], weight)

    def found(self, id: str | int, score: float) -> Found:
        """Return an item as an API object."""
        number = self._numbers[id]
        return Found(
            item=number,
            id=_printable(id),
            score=score,
            picture=self.file(number) is not None,
            metadata={n: _printable(v) for n, v in self.index.metadata(id).items()},
        )

    def file(self, number: int) -> Path | None:
        """Return the image path of an item, or None if its id is not a path to an image."""
        id = self.id(number)
        if isinstance(id, str) and os.path.splitext(id)[1].lower() in SUFFIXES:
            return Path(id)
        return None

    def opened(self, number: int, open_file: Callable[[Path], T]) -> T:
        """Return the image of an item, opened by a function of its path.

        Raises:
            RequestError: the item has no readable image (404).
        """
        file = self.file(number)
        try:
            if file is None:
                raise DataError(f"item {number:,} has no image file on the server")
            return open_file(file)
        except DataError as error:
            raise RequestError(str(error), 404, "no_picture") from None

    def picture(self, number: int, size: int) -> bytes:
        """Return a thumbnail of an item as WebP, with `size` rounded up to one of `SIZES`.

        Raises:
            RequestError: the item has no readable image (404).
        """
        size = next((larger for larger in SIZES if larger >= size), SIZES[-1])
        with self._lock:
            if (cached := self._thumbnails.get((number, size))) is not None:
                self._thumbnails.move_to_end((number, size))
                return cached
        thumbnail = self.opened(number, lambda file: webp(file, size, self._max_pixels))
        with self._lock:
            if (number, size) not in self._thumbnails:
                self._cached_bytes += len(thumbnail)
            self._thumbnails[number, size] = thumbnail
            while self._cached_bytes > CACHE_BYTES:
                self._cached_bytes -= len(self._thumbnails.popitem(last=False)[1])
        return thumbnail

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
    """Return the filter options of a column, or None if all its values are missing."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    distinct = sorted(set(present), key=lambda value: (isinstance(value, str), value))
    is_text = any(isinstance(value, str) for value in present)
    choices = [_printable(value) for value in distinct] if len(distinct) <= MAX_CHOICES else None
    if is_text:
        return Column(name=name, kind="text", values=choices)
    return Column(
        name=name,
        kind="number",
        values=choices,
        least=float(distinct[0]),
        most=float(distinct[-1]),
    )


def _printable(value: Any) -> Any:
    """Replace what UTF-8 cannot encode, such as surrogates in file names."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
