"""Retrieval: a nearest-neighbour index over embeddings, with exact search, stored on disk."""

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from PIL import Image

from vlm import display
from vlm.errors import ConfigError, DataError
from vlm.heads import index_folder
from vlm.heads.codes import CANDIDATES, LEAST, Coding, candidates
from vlm.heads.encoder import Encoder
from vlm.heads.filters import Value, Where, checked_columns, matching
from vlm.heads.hits import Hit, Hits, picture_of
from vlm.heads.inputs import Inputs, Item, check_count, kind, named_items, split
from vlm.heads.items import GivenId, Id, Items, Stored
from vlm.heads.model_identity import check_identity, identity, mismatch
from vlm.heads.prompts import normalise
from vlm.heads.query import Query, embed_queries, encode_items, least_score, queries_in
from vlm.heads.top_k import Searcher, recall_at_k, rescored, top_k
from vlm.inputs.opening import OnError

CHUNK = 8192  # texts or images encoded per block
EMBEDDINGS = 1 << 17  # embeddings per block: search is fastest over large blocks
QUERY_BLOCK = 256
Queries = Query | Inputs | Iterable[Query | Item]
_ONE = (str, int, np.integer, os.PathLike)  # types of a single id
_log = logging.getLogger(__name__)


class _Limits(TypedDict, total=False):
    where: Where | None
    min_score: float | None
    min_probability: float | None


class RetrievalIndex:
    """Nearest-neighbour index of images or texts, searched by text, image or embedding.

    A `str` is always treated as text; an image is a `pathlib.Path`, a PIL image or an array of
    pixels. Search is exact. Large blocks in memory get int8 codes as they are searched, a quarter
    of their size (half for float16), which prune most rows. Memory-mapped blocks get none.

    Args:
        model: a model from `vlm.load`.
        dtype: of the stored embeddings; float16 halves the memory, changes a cosine by under
            1e-3, and is slower to search on a CPU.
        coding: quantization. None: embeddings are scanned, and the results are exact. "int8" or
            "binary": codes of 1/4 or 1/32 of the size are scanned, and the best candidates are
            scored exactly. Once the index is saved, memory holds only the codes.

    Raises:
        ConfigError: an unknown dtype or coding.

    Example:
        >>> index = vlm.RetrievalIndex(model)
        >>> index.add(pictures, ids=["red", "green", "blue"])
        >>> index.search(pictures[1], k=1)[0].id
        'green'
        >>> [hit.id for hit in index.search("a red square", k=3)].count("red")
        1
    """

    def __init__(
        self,
        model: Encoder,
        dtype: Stored = "float32",
        coding: Coding | None = None,
    ):
        if dtype not in ("float32", "float16"):
            raise ConfigError(f"dtype is {dtype!r}: an index stores 'float32' or 'float16'")
        if coding not in (None, *CANDIDATES):
            raise ConfigError(f"coding is {coding!r}: it must be 'int8', 'binary' or None")
        self.model = model
        self._items = Items(dtype, coding)
        self._make_searcher: Callable[[list[np.ndarray]], Searcher] | None = None
        self._searcher: Searcher | None = None
        self.mismatch: str | None = None  # how the model differs from the one that built the index

    def add(
        self,
        items: Inputs,
        ids: Iterable[GivenId] | None = None,
        batch_size: int | None = None,
        metadata: Mapping[str, Iterable[Value]] | None = None,
        *,
        on_error: OnError | None = None,
    ) -> None:
        """Encode and store images, texts or embeddings, from any iterable, in bounded memory.

        An `add` that fails leaves the index as it was.

        Args:
            items: images, texts or embeddings, all of one kind; or a single one.
            ids: a unique text, path or integer for each; by default the absolute path of an image
                on disk, or else its running number in the index.
            batch_size: for encoding images; None uses the default of the model.
            metadata: columns of texts or numbers, one value per item, for `where` in `search`.
            on_error: called with the position of each unreadable image and the error; the image is
                skipped. None: the first one raises the error.

        Raises:
            ConfigError: an id given twice or already in the index, another number of ids or values
                than items, items of several kinds, or a `str` that names an image on this disk.
            DataError: an embedding that is zero or not finite, or fewer embeddings than items.
        """
        self._add(items, ids, batch_size, metadata or {}, on_error, replace=False)

    def update(
        self,
        items: Inputs,
        ids: Iterable[GivenId] | None = None,
        batch_size: int | None = None,
        metadata: Mapping[str, Iterable[Value]] | None = None,
        *,
        on_error: OnError | None = None,
    ) -> None:
        """Add items, replacing those with the same ids (upsert); otherwise like `add`.

        A replaced item keeps its metadata in columns that `metadata` does not name. To erase a
        value, give None in its column: `metadata={"camera": [None]}`.
        """
        self._add(items, ids, batch_size, metadata or {}, on_error, replace=True)

    def remove(self, ids: GivenId | Iterable[GivenId]) -> None:
        """Remove items from the index.

        Raises:
            ConfigError: an id that is not in the index; then nothing is removed.
        """
        self._items.remove([ids] if isinstance(ids, _ONE) else ids)

    def relocate(self, folders: Mapping[str, str], strict: bool = True) -> None:
        """Change the ids of images that moved to other folders, such as {"/old": "/new"}.

        The folder "." is that of relative paths. A `save` keeps the new ids.

        Raises:
            ConfigError: two images would have the same path, or (if strict) a folder has none.
        """
        self._items.relocate(folders, strict)

    def merge(self, other: "RetrievalIndex", replace: bool = False) -> None:
        """Add all items of another index of the same model.

        Args:
            other: not changed.
            replace: replace items with the same ids.

        Raises:
            ConfigError: an id that both have, without `replace`.
            CheckpointError: an index of a model that embeds differently.
        """
        if other.model is not self.model:
            check_identity(identity(other.model), self.model, Path("the other index"))
        if other is self or not len(other):
            return
        for name in () if replace else other._items.at:
            if name in self:
                raise ConfigError(f"id {name!r} is in both indexes: merge with replace=True")
        self._add_items_of(other._items, np.flatnonzero(other._items.live))

    def _add_items_of(self, source: Items, positions: np.ndarray) -> None:
        """Add items of another collection, replacing those with the same ids."""
        step = range(0, len(positions), CHUNK)
        rows = [np.asarray(source.rows_at(positions[i : i + CHUNK]), self.dtype) for i in step]
        columns = {n: [c[p] for p in positions] for n, c in source.columns.items()}
        self._items.add(rows, [source.ids[p] for p in positions], columns)
        self._searcher = None

    def _add(self, items, ids, batch_size, metadata, on_error, replace: bool) -> None:
        item_kind, stream, single = split(items, "add")
        if single and isinstance(ids, _ONE):
            ids = [ids]
        if isinstance(ids, str):
            raise ConfigError(f"ids is the text {ids!r}: give a list with one id per item")
        if self.mismatch and item_kind != "embedding":
            _log.warning(
                "%s embeds with %s than the index has: rebuild it", self.model.name, self.mismatch
            )
        new_ids: list[Id] = []
        given = None if ids is None else iter(ids)
        known, first_number = self._items.at, self._items.next_number
        stream = named_items(stream, item_kind, given, new_ids, known, first_number, replace)
        rows, unread, first = [], set(), 0

        def skip(number: int, error: DataError) -> None:
            unread.add(first + number)
            on_error(first + number, error)

        while head := list(itertools.islice(stream, 1)):
            size = EMBEDDINGS if item_kind == "embedding" else CHUNK
            chunk = itertools.chain(head, itertools.islice(stream, size - 1))
            z = encode_items(self.model, chunk, item_kind, batch_size, skip if on_error else None)
            first += CHUNK
            self._check_width(z, "embeddings")
            rows.append(z.astype(self.dtype))
        columns = checked_columns(metadata, len(new_ids))
        if unread:
            readable = [number for number in range(len(new_ids)) if number not in unread]
            new_ids = [new_ids[number] for number in readable]
            columns = {name: [values[i] for i in readable] for name, values in columns.items()}
        check_count(self.model.name, sum(map(len, rows)), len(new_ids))
        self._items.add([z for z in rows if len(z)], new_ids, columns)
        self._searcher = None

    def _check_width(self, z: np.ndarray, noun: str) -> None:
        if self.embed_dim and z.shape[1] != self.embed_dim:
            fit = f"{z.shape[1]} dimensions do not match an index of {self.embed_dim}"
            raise ConfigError(f"{noun} of {fit}: encode with {self.model.name}")

    @overload
    def search(
        self, query: Query | str | os.PathLike | Image.Image, k: int = 5, **limits: Unpack[_Limits]
    ) -> Hits: ...
    @overload  # Hits of a vector, list[Hits] of rows
    def search(self, query: np.ndarray, k: int = 5, **limits: Unpack[_Limits]) -> Any: ...
    @overload
    def search(
        self, query: Iterable[Query | Item], k: int = 5, **limits: Unpack[_Limits]
    ) -> list[Hits]: ...
    def search(
        self,
        query: Queries,
        k: int = 5,
        *,
        where: Where | None = None,
        min_score: float | None = None,
        min_probability: float | None = None,
    ) -> Hits | list[Hits]:
        """Return the k nearest items by cosine, best first; ties in the order they were added.

        Args:
            query: a text, an image, an embedding or a `Query`, which adds and subtracts those; or a
                list of one of these (or an (n, d) array), for a list of results.
            k: results per query; all that qualify if there are fewer.
            where: filter on metadata: `{"camera": "X100"}`,
                `{"year": [2023, 2024]}`, or a function of the columns as arrays.
            min_score: minimum cosine of a result.
            min_probability: minimum probability of a result, for a model of the sigmoid loss.

        Raises:
            ConfigError: a k below 1, a query of another width, a `str` that names an image file on
                this disk, an unknown column, or a minimum probability for a model whose loss
                defines none.
            DataError: a query of an unsupported type.
        """
        if k < 1:
            raise ConfigError(f"k is {k}: it must be at least 1")
        z, single = self._query_embeddings(query)
        least = least_score(self.model, min_score, min_probability)
        if not len(z):
            return []
        items = self._items
        allowed = None if items.live.all() else items.live
        if where is not None:
            allowed = items.live & matching(items.columns, len(items.ids), where)
        results = self._nearest(z, k, allowed, least)
        return results[0] if single else results

    def like(
        self, ids: GivenId | Sequence[GivenId], k: int = 5, *, where: Where | None = None
    ) -> Hits:
        """Return the k items nearest to the mean of some items, excluding those ("more like this").

        Raises:
            ConfigError: an id that is not in the index, no ids, or a k below 1.
        """
        if k < 1:
            raise ConfigError(f"k is {k}: it must be at least 1")
        items = self._items
        positions = [items.position(i) for i in ([ids] if isinstance(ids, _ONE) else ids)]
        if not positions:
            raise ConfigError("there are no ids to search with: give at least one")
        rows = items.rows_at(np.asarray(positions)).astype(np.float32)
        z = normalise(rows.mean(0, keepdims=True), "the mean of the items")
        allowed = items.live.copy()
        allowed[positions] = False
        if where is not None:
            allowed &= matching(items.columns, len(items.ids), where)
        return self._nearest(z, k, allowed, -np.inf)[0]

    def __getstate__(self) -> dict[str, Any]:  # a copy or a pickled index searches on the host
        return self.__dict__ | {"_searcher": None, "_make_searcher": None}

    def place(self, mesh: Mesh | None, approximate: bool = False) -> None:
        """Search on the devices of a mesh from now on; None: on the host again.

        Each device holds one shard of the rows; the results are the same. With `approximate` a TPU
        uses `approx_max_k`, which may miss a few.
        """
        from vlm.heads.device_search import searcher_on

        self.search_with(searcher_on(mesh, approximate))

    def search_with(self, make: Callable[[list[np.ndarray]], Searcher] | None) -> None:
        """Search with a searcher that `make` builds from the rows, as `vlm.heads.faiss_search`.

        It is built at the next search, and rebuilt after an `add`. None: search on the host.
        """
        self._make_searcher, self._searcher = make, None

    def recall(self, queries: Queries, k: int = 10) -> float:
        """Compute recall@k of `search` against exact search, as a mean over queries.

        It is 1 unless the index has codes, or searches with faiss or approximately on devices.

        Args:
            queries: as for `search`; they should be representative of real queries.

        Raises:
            ConfigError: no queries, a k below 1, or an empty index.
        """
        z, _ = self._query_embeddings(queries)
        if not len(z) or k < 1 or not len(self):
            raise ConfigError(
                f"{len(z)} queries, k {k} and {len(self)} items: give at least one of each"
            )
        allowed, rows = self._items.live, self._items.rows
        _, exact = top_k(z, rows, min(k, len(self)), allowed=allowed)
        self._nearest(z[:1], 1, allowed, -np.inf)  # builds a searcher, if there is one
        positions, _ = self._top_k(z, k, allowed, -np.inf)
        return recall_at_k(z, rows, positions, np.stack(exact))

    def _query_embeddings(self, query: Any) -> tuple[np.ndarray, bool]:
        if (mixed := queries_in(query)) is not None:
            z, single = embed_queries(self.model, mixed), isinstance(query, Query)
        else:
            what, stream, single = split(query, "search")
            queries = list(stream)
            for i, item in enumerate(queries):
                if (item_kind := kind(item, "search")) != what:
                    raise ConfigError(
                        f"query {i} is {item_kind}, the first {what}: search apart, or as Query"
                    )
            if not queries:
                return np.zeros((0, 1), np.float32), single
            z = encode_items(self.model, queries, what)
            check_count(self.model.name, len(z), len(queries))
        self._check_width(z, "a query")
        return z, single

    def _nearest(self, z: np.ndarray, k: int, allowed: np.ndarray | None, least: float):
        if not len(self) or (allowed is not None and not allowed.any()):
            return [Hits() for _ in z]
        self._items.join_small_blocks()
        if self._make_searcher and self._searcher is None:
            self._searcher = self._make_searcher(self._items.rows)
        results = []
        for start in range(0, len(z), QUERY_BLOCK):
            nearest = self._top_k(z[start : start + QUERY_BLOCK], k, allowed, least)
            for row, values in zip(*nearest, strict=True):
                pairs = zip(row.tolist(), values.tolist(), strict=True)
                results.append(Hits(Hit(self._items.ids[i], s) for i, s in pairs))
        return results

    def _top_k(self, z: np.ndarray, k: int, allowed: np.ndarray | None, least: float):
        if self._searcher is not None:
            return self._searcher.search(z, k, allowed, least)
        rows = self._items.rows
        if self.coding is None:
            bounds = self._items.bounds()
            return top_k(z, rows, k, allowed=allowed, min_score=least, bounds=bounds)
        count = max(LEAST, CANDIDATES[self.coding] * k)
        codes, centre = self._items.codes, self._items.centre
        assert centre is not None
        proposed = candidates(z, codes, count, self.coding, centre, allowed)
        best = [rescored(q, rows, p, k, least) for q, p in zip(z, proposed, strict=True)]
        return [at for at, _ in best], [scores for _, scores in best]

    def __len__(self) -> int:
        return len(self._items.at)

    def __contains__(self, id: Any) -> bool:
        return self._items.known(id) is not None

    @property
    def dtype(self) -> Stored:
        """The dtype of the stored embeddings."""
        return self._items.dtype

    @property
    def coding(self) -> Coding | None:
        """The codes that are scanned first, if any."""
        return self._items.coding

    @property
    def ids(self) -> tuple[Id, ...]:
        """The ids, in the order in which they were added."""
        return tuple(itertools.compress(self._items.ids, self._items.live))

    @property
    def embed_dim(self) -> int | None:
        """The width of the embeddings; None while the index is empty."""
        return self._items.embed_dim

    @property
    def columns(self) -> dict[str, list[Value]]:
        """The metadata by column, in the order of `ids`."""
        live = self._items.live
        return {n: list(itertools.compress(c, live)) for n, c in self._items.columns.items()}

    def metadata(self, id: GivenId) -> dict[str, Value]:
        """Return the metadata of one item.

        Raises:
            ConfigError: an id that is not in the index.
        """
        at = self._items.position(id)
        return {name: column[at] for name, column in self._items.columns.items()}

    def embeddings(self, ids: Sequence[GivenId] | None = None) -> Float[np.ndarray, "n d"]:
        """Return the embeddings of some items, or of all in the order of `ids`, as float32.

        Raises:
            ConfigError: an id that is not in the index.
        """
        at = np.flatnonzero(self._items.live)
        if ids is not None:
            at = np.asarray([self._items.position(name) for name in ids], np.int64)
        return np.asarray(self._items.rows_at(at), np.float32)

    def __repr__(self) -> str:
        stored = self._items.rows if self.coding is None else self._items.codes
        bounds = [block.bounds for block in self._items.blocks if block.bounds is not None]
        size, width = sum(part.nbytes for part in [*stored, *bounds]) / 2**20, self.embed_dim
        width = f" x {width}" if width else ""
        kind = self.dtype if self.coding is None else f"{self.dtype}, {self.coding} codes"
        return f"RetrievalIndex({self.model.name}, {len(self):,}{width} {kind}, {size:.1f} MiB)"

    def _repr_html_(self) -> str:
        pictures = "".join(picture_of(id) for id in self.ids[:8])
        return f"<div><p>{display.escape(repr(self))}</p>{pictures}</div>"

    def save(self, folder: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Save the index to a folder, or update the folder that it was loaded from.

        Only new items are written. The save is atomic: a reader finds the old index or the new one,
        even if the process is killed. Concurrent saves to a folder are serialized by a lock.
        Afterwards the embeddings are memory-mapped from the folder.

        Args:
            folder: on a local disk; new, empty, or of an index.
            overwrite: replace any index there.

        Raises:
            ConflictError: without `overwrite`, an index that this one was not loaded from, or that
                another process has changed since. This index keeps all its items: call `reload`
                and save again.
            CheckpointError: the folder holds other files.
            ConfigError: the index is empty, or the folder cannot be written.
        """
        folder = index_folder.local_folder(folder)
        if not len(self):
            raise ConfigError(f"the index is empty: add items before saving it to {folder}")
        index_folder.check_target(folder)
        self._items.save(folder, identity(self.model), overwrite)
        self._searcher = None  # positions may have changed

    def reload(self) -> None:
        """Read the folder of the index again, and apply the unsaved changes of this index.

        For an item that both changed, the version of this index is kept.

        Raises:
            ConfigError: the index was neither loaded nor saved yet.
            CheckpointError: see `load`.
        """
        items = self._items
        if items.folder is None:
            raise ConfigError("the index has no folder to read again: save it, or load one")
        latest = RetrievalIndex.load(items.folder, self.model)
        for moved in ({}, items.moved):  # items may have been removed before and after a move
            latest._items.relocate(moved, strict=False)
            latest.remove([name for name in items.removed if name in latest])
        latest._add_items_of(items, items.unsaved())
        latest._items.generations = items.generations | latest._items.generations
        self._items, self._searcher = latest._items, None

    @classmethod
    def load(cls, folder: str | os.PathLike, model: Encoder) -> "RetrievalIndex":
        """Load a saved index; the embeddings are memory-mapped, and read when searched.

        Raises:
            CheckpointError: no index, a corrupt one, other files, or an index of another model.
            ConfigError: a bucket.
        """
        folder = index_folder.local_folder(folder)
        items, meta = Items.load(folder)
        check_identity(meta, model, folder)
        index = cls(model, items.dtype, items.coding)
        index._items, index.mismatch = items, mismatch(meta, model)
        return index
