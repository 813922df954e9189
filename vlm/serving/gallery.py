"""Items of an index for the web page: metadata, filters and thumbnails, by item number."""

import itertools
import mimetypes
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
from etils import epath

from vlm.errors import DataError
from vlm.heads.filters import Condition, are_times, where_all
from vlm.heads.hits import Hit
from vlm.heads.image_paths import RELATIVE, is_image_path, is_relative
from vlm.heads.query import Query
from vlm.heads.retrieval import RetrievalIndex
from vlm.inputs.opening import extension_of
from vlm.paths import as_path
from vlm.serving.batched import Batched
from vlm.serving.batching import Batcher
from vlm.serving.limits import RequestError
from vlm.serving.protocol import Column, Found, IndexAnswer

T = TypeVar("T")

SIZES = (64, 128, 256, 512, 1024, 2048)  # of thumbnails: pixels on the long side
CACHE_BYTES = 64 << 20  # of thumbnails
MAX_CHOICES = 50  # distinct values of a column that the page lists in a menu
TIMES = "modified"  # column of `vlm index`, in nanoseconds since 1970
_DATE = re.compile(r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])([T ]\d\d(:?\d\d).*)?")
QUERIES = 64  # searched together
FIRST = 60  # items on the start page


class Gallery:
    """Read-only view of an index.

    Args:
        name: title on the page.
        model: makes the thumbnails, in decoding processes.
        generation: that of the index, which every save changes.
        previous: view of the same folder before it was saved again. Its items keep their numbers.
    """

    def __init__(
        self,
        index: RetrievalIndex,
        name: str,
        model: Batched,
        generation: str | None = None,
        previous: "Gallery | None" = None,
    ):
        self.index, self.name, self._model = index, name, model
        self.generation = generation
        live, before = dict.fromkeys(index.ids), [] if previous is None else previous.ids
        known = set(before)
        self.ids = [id if id in live else None for id in before]  # None: removed
        self.ids += [id for id in live if id not in known]
        self._numbers = {id: number for number, id in enumerate(self.ids) if id is not None}
        self._thumbnails: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._cached_bytes, self._lock = 0, threading.Lock()
        self._searches = Batcher(self._search, range(1, QUERIES + 1), name="vlm-search")
        self.about = self._describe()

    def id(self, number: int) -> str | int:
        """Return the id of an item.

        Raises:
            RequestError: there is no such item (404).
        """
        id = self.ids[number] if 0 <= number < len(self.ids) else None
        if id is None:
            reason = (
                "it is no longer in the index"
                if 0 <= number < len(self.ids)
                else f"item numbers are 0 to {len(self.ids) - 1:,}"
            )
            raise RequestError(f"there is no item {number:,}: {reason}", 404, "no_item")
        return id

    def number(self, id: str) -> int:
        """Return the number of an item by its id, which may be an integer.

        Raises:
            RequestError: there is no such item (404).
        """
        for name in (id, int(id) if id.isdecimal() else id):
            if name in self._numbers:
                return self._numbers[name]
        raise RequestError(f"the index has no item with the id {id[:200]!r}", 404, "no_item")

    def search(
        self, query: Query, k: int, conditions: Sequence[Condition], min_score: float | None
    ) -> Future:
        """Return the future hits of a query, best first.

        Queries that wait at the same time for the same filter are searched together: one pass over
        the rows takes as long for 16 queries as for one.
        """
        return self._searches.submit((tuple(conditions), min_score), (query, k))

    def _search(self, key: Any, items: list[tuple[Query, int]]) -> list[list[Hit]]:
        conditions, min_score = key
        most = min(max(k for _, k in items), max(1, len(self.index)))
        results: Any = self.index.search(
            [query for query, _ in items],
            most,
            where=where_all(conditions) if conditions else None,
            min_score=min_score,
        )
        return [hits[:k] for hits, (_, k) in zip(results, items, strict=True)]

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

    def file(self, number: int) -> epath.Path | None:
        """Return the image path of an item, or None if its id is not a path to an image."""
        id = self.id(number)
        return as_path(str(id)) if is_image_path(id) else None

    def opened(self, number: int, open_file: Callable[[epath.Path], T]) -> T:
        """Return the image of an item, opened by a function of its path.

        Raises:
            RequestError: the item has no image, or its file is missing or unreadable (404).
        """
        file = self.file(number)
        if file is None:
            raise RequestError(f"item {number:,} has no image file", 404, "no_picture")
        try:
            if not file.exists():
                old = RELATIVE if is_relative(self.id(number)) else "OLD"
                raise RequestError(
                    f"there is no file {_printable(str(self.id(number)))} on the server: put it "
                    f"there, or start the server with --root {old}=FOLDER if the images moved",
                    404,
                    "picture_missing",
                )
            return open_file(file)
        except (DataError, OSError) as error:
            message = str(error)
            if isinstance(error, OSError):
                message = f"{file} cannot be read ({error.strerror or error})"
            elif str(file) not in message:
                message = f"{file}: {message}"
            raise RequestError(_printable(message), 404, "picture_unreadable") from None

    def original(self, number: int) -> tuple[epath.Path, str]:
        """Return the image file of an item, and its media type, by the content of the file.

        Raises:
            RequestError: the item has no readable image (404).
        """
        return self.opened(number, lambda file: (file, _media_type(file)))

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
        thumbnail = self.opened(number, lambda file: self._model.thumbnail(file, str(file), size))
        with self._lock:
            if (number, size) not in self._thumbnails:
                self._cached_bytes += len(thumbnail)
            self._thumbnails[number, size] = thumbnail
            while self._cached_bytes > CACHE_BYTES:
                self._cached_bytes -= len(self._thumbnails.popitem(last=False)[1])
        return thumbnail

    def _describe(self) -> IndexAnswer:
        columns = [_column(name, values) for name, values in self.index.columns.items()]
        ids = self.index.ids
        step = max(1, len(ids) // FIRST)
        first = [self.found(id, 0.0) for id in itertools.islice(ids, 0, FIRST * step, step)]
        return IndexAnswer(
            name=self.name,
            model=self.index.model.name,
            count=len(ids),
            generation=self.generation,
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
    if all(isinstance(value, str) and _DATE.fullmatch(value) for value in distinct):
        days = {"earliest": distinct[0][:10], "latest": distinct[-1][:10]}
        return Column(name=name, kind="date", **days)
    if name == TIMES and not is_text and are_times(present):
        first, last = (str(np.datetime64(int(t), "ns"))[:10] for t in (distinct[0], distinct[-1]))
        return Column(name=name, kind="date", earliest=first, latest=last, times=True)
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


def _media_type(file: epath.Path) -> str:
    kind = extension_of(file.read_bytes())
    return mimetypes.guess_type(f"image.{kind}")[0] or f"image/{kind}"


def _printable(value: Any) -> Any:
    """Replace what UTF-8 cannot encode, such as surrogates in file names."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
