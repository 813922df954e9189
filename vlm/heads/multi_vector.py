"""Late interaction: an index of items with several vectors each, searched by MaxSim.

The vectors of an item are those of its patches or tokens, as in ColBERT (arXiv:2004.12832), FILIP
(arXiv:2111.07783) and ColPali (arXiv:2407.01449).
"""

import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Float

from vlm.bundle import Bundle
from vlm.errors import CheckpointError, ConfigError, DataError, brief
from vlm.heads import codes
from vlm.heads.codes import CANDIDATES, LEAST, Coding
from vlm.heads.hits import Hit, Hits
from vlm.heads.index_folder import local_folder
from vlm.heads.inputs import default_id, is_float, kind
from vlm.heads.items import Id, Stored
from vlm.heads.max_similarity import (
    DeviceMaxSimilarity,
    Queries,
    best_items,
    max_similarity,
)
from vlm.heads.model_identity import check_identity, identity
from vlm.heads.prompts import normalise
from vlm.heads.token_embeddings import image_tokens, multi_vector_bundle, text_tokens
from vlm.inputs.opening import ImageLike, is_image
from vlm.weights.fields import choice, fields, integer, read_json_of_format
from vlm.weights.new_folder import new_folder

VECTORS_FILE, ABOUT_FILE = "vectors.npy", "multi_vector.json"
FORMAT = 1
CHUNK = 256  # items encoded at a time
CODED_ROWS = 1 << 16  # rows coded at a time
QUERY_BLOCK = 32

Item = ImageLike | jax.Array  # a float array of shape (t, d) is the vectors of one item


class MultiVectorIndex:
    """Index of items with several vectors each, searched by late interaction (MaxSim).

    The score of an item is the sum, over the vectors of the query, of the largest cosine with a
    vector of the item. Divide it by the number of query vectors for FILIP's mean. A `str` is a
    text; a path, a PIL image or uint8 pixels are an image; a float array of shape (t, d) is the
    vectors of one item, of any model, and is scaled to unit norm. BLIP-2 has several vectors of an
    image and one of a text, so that the score of an image is its own: their largest cosine.

    Args:
        model: a model from `vlm.load`, which encodes images and texts. None: all items and queries
            are arrays of vectors.
        dtype: of the stored vectors.
        coding: None: search is exact. "int8" or "binary": codes of 1/4 or 1/32 of the size (and
            four bytes for each vector) are scanned, and the best candidates scored exactly. After
            `load`, memory holds only the codes.

    Raises:
        ConfigError: an unknown dtype or coding.

    Example:
        >>> index = vlm.heads.MultiVectorIndex(model)
        >>> index.add(pictures, ids=["red", "green", "blue"])
        >>> index.search(pictures[1], k=1)[0].id
        'green'
    """

    def __init__(
        self, model: Bundle | None = None, dtype: Stored = "float32", coding: Coding | None = None
    ):
        if dtype not in ("float32", "float16"):
            raise ConfigError(f"dtype is {dtype!r}: an index stores 'float32' or 'float16'")
        if coding not in (None, *CANDIDATES):
            raise ConfigError(f"coding is {coding!r}: it must be 'int8', 'binary' or None")
        self.model, self.dtype = model, dtype
        self.coding: Coding | None = coding
        self._ids: dict[Id, None] = {}
        self._parts: list[np.ndarray] = []  # rows of items, joined at the next search
        self._starts = np.zeros(1, np.int64)
        self._codes: tuple[Any, np.ndarray] | None = None
        self._mesh: Mesh | None = None
        self._searcher: DeviceMaxSimilarity | None = None
        self._identity: Any = None  # of the model that made the vectors, if it is not loaded

    def add(self, items: Item | Iterable[Item], ids: Iterable[Id] | None = None) -> None:
        """Encode and store items; an `add` that fails leaves the index as it was.

        Args:
            items: images, texts or arrays of vectors, also mixed; or a single one.
            ids: a unique text or integer for each; by default the path of an image file, or else
                the running number in the index.

        Raises:
            ConfigError: an id twice, another number of ids than items, vectors of another width,
                or an image or text without a model.
            DataError: an item without vectors, or a vector that is zero or not finite.
        """
        listed: Any = [items] if _is_one(items) else items
        if isinstance(ids, str | int):
            ids = [ids]
        named = None if ids is None else iter(ids)
        new: dict[Id, None] = {}
        found: list[np.ndarray] = []
        for chunk in _chunks(iter(listed)):
            for number, item in enumerate(chunk, len(new)):
                new[self._name(item, len(self) + number, named, new)] = None
            width = found[0].shape[1] if found else self._width
            vectors = self._vectors_of(chunk, len(found), "item", width)
            found += [z.astype(self.dtype) for z in vectors]
        if named is not None and (extra := next(named, None)) is not None:
            raise ConfigError(f"id {extra!r} has no item: give one id for every item")
        if not found:
            return
        self._parts += found
        ends = self._starts[-1] + np.cumsum([len(z) for z in found])
        self._starts = np.concatenate([self._starts, ends])
        self._ids |= new
        self._codes = self._searcher = None

    def search(self, query: Item | Iterable[Item], k: int = 5) -> Any:
        """Return the k items with the largest MaxSim, best first; ties in the order of `add`.

        Args:
            query: a text, an image or an array of vectors; or a list of them, for a list of hits.
            k: results per query.

        Returns:
            `Hits`, or a list of `Hits`.

        Raises:
            ConfigError: a k below 1, or vectors of another width.
            DataError: a query without vectors, or an unreadable image.
        """
        if k < 1:
            raise ConfigError(f"k is {k}: it must be at least 1")
        one = _is_one(query)
        results = [
            Hits(Hit(self.ids[i], s) for i, s in zip(at.tolist(), scores.tolist(), strict=True))
            for at, scores in zip(*self._nearest(self._queries(query, one), k), strict=True)
        ]
        return results[0] if one else results

    def scores(self, query: Item) -> Float[np.ndarray, " n"]:
        """Return the exact MaxSim of one query and every item, in the order of `ids`.

        Raises:
            ConfigError, DataError: see `search`.
        """
        (z,) = self._queries(query, True)
        return max_similarity([z], self._rows(), self._starts)[0] if len(self) else np.zeros(0)

    def recall(self, queries: Iterable[Item], k: int = 10) -> float:
        """Compute recall@k of `search` against exact search, as a mean over queries.

        Raises:
            ConfigError: no queries, a k below 1, or an empty index.
        """
        z = self._queries(queries, False)
        if not z or k < 1 or not len(self):
            raise ConfigError(
                f"{len(z)} queries, k {k} and {len(self)} items: give at least one of each"
            )
        found, _ = self._nearest(z, k)
        exact, _ = best_items(max_similarity(z, self._rows(), self._starts), k)
        right = [len(np.intersect1d(a, b)) for a, b in zip(found, exact, strict=True)]
        return sum(right) / sum(map(len, exact))

    def place(self, mesh: Mesh | None) -> None:
        """Search exactly on the devices of a mesh from now on; None: on the host again.

        Each device holds a shard of the items, padded to the longest one.
        """
        self._mesh, self._searcher = mesh, None

    def save(self, folder: str | os.PathLike) -> None:
        """Write the index to a local folder, atomically; an index there is replaced.

        Raises:
            ConfigError: the index is empty, or a bucket.
            CheckpointError: the folder holds other files.
        """
        folder = local_folder(folder)
        if not len(self):
            raise ConfigError(f"the index is empty: add items before saving it to {folder}")
        about = {
            "format": FORMAT, "ids": list(self._ids), "lengths": np.diff(self._starts).tolist(),
            "coding": self.coding,
            "model": self._identity if self.model is None else identity(self.model),
        }  # fmt: skip
        with new_folder(folder, frozenset([VECTORS_FILE, ABOUT_FILE])) as new:
            np.save(os.fspath(new / VECTORS_FILE), self._rows())
            (new / ABOUT_FILE).write_text(json.dumps(about))

    @classmethod
    def load(cls, folder: str | os.PathLike, model: Bundle | None = None) -> "MultiVectorIndex":
        """Load a saved index; its vectors are memory-mapped.

        Raises:
            CheckpointError: no index, a corrupt one, or an index of another model.
        """
        folder = local_folder(folder)
        about = read_json_of_format(epath.Path(folder / ABOUT_FILE), FORMAT)
        if model is not None and about.get("model") is not None:
            check_identity(fields(about["model"], f"{folder}: model"), model, folder)
        try:
            vectors = np.load(folder / VECTORS_FILE, mmap_mode="r", allow_pickle=False)
            coding = choice(about["coding"], (None, *CANDIDATES), "coding")
            ids, lengths = about["ids"], [integer(n, "lengths") for n in about["lengths"]]
            fits = (
                vectors.ndim == 2
                and vectors.dtype.name in ("float32", "float16")
                and sum(lengths) == len(vectors)
                and len(lengths) == len(ids) == len(dict.fromkeys(ids))
                and all(type(name) in (str, int) for name in ids)
            )
        except (OSError, ValueError, KeyError, TypeError, EOFError, CheckpointError) as error:
            raise CheckpointError(
                f"{folder} is corrupt ({brief(str(error))}): save the index again"
            ) from None
        if not fits:
            raise CheckpointError(
                f"{folder} is corrupt: {VECTORS_FILE} and {ABOUT_FILE} do not fit together; save "
                "the index again"
            )
        index = cls(model, vectors.dtype.name, coding)
        index._identity = about.get("model")
        index._ids, index._parts = dict.fromkeys(ids), [vectors]
        index._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return index

    @property
    def ids(self) -> tuple[Id, ...]:
        """The ids, in the order in which they were added."""
        return tuple(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def __repr__(self) -> str:
        rows, kind = int(self._starts[-1]), self.coding or "exact"
        return f"MultiVectorIndex({len(self):,} items, {rows:,} vectors, {self.dtype}, {kind})"

    def __getstate__(self) -> dict[str, Any]:  # a copy or a pickled index searches on the host
        return self.__dict__ | {"_searcher": None, "_mesh": None}

    # ------------------------------------------------------------------------------ internals

    def _name(self, item: Any, number: int, named: Iterator[Id] | None, new: dict[Id, None]) -> Id:
        """Return the id of an item, checked."""
        name: Any = default_id(item, number, self._ids) if named is None else next(named, None)
        if name is None:
            raise ConfigError(f"there are only {len(new)} ids: give one for every item")
        name = int(name) if isinstance(name, np.integer) else name
        name = os.fspath(name) if isinstance(name, os.PathLike) else name
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise ConfigError(f"id {name!r} is neither a text nor an integer")
        if name in self._ids or name in new:
            raise ConfigError(f"id {name!r} is in the index already: give ids of your own")
        return name

    def _queries(self, query: Any, one: bool) -> Queries:
        return self._vectors_of([query] if one else list(query), 0, "query", self._width)

    @property
    def _width(self) -> int | None:
        """Dimensions of the vectors, if they are known."""
        if self._parts:
            return self._parts[0].shape[1]
        return None if self.model is None else self.model.embed_dim

    def _vectors_of(self, items: list[Any], first: int, noun: str, width: int | None) -> Queries:
        """Return the unit-norm vectors of each item, of `width` dimensions if it is known."""
        kinds = ["vectors" if _is_vectors(item) else kind(item, noun) for item in items]
        given, texts, images, single = (
            [i for i, item_kind in enumerate(kinds) if item_kind == name]
            for name in ("vectors", "text", "image", "embedding")
        )
        if single:
            raise ConfigError(
                f"{noun} {first + single[0]} is one vector: give its vectors as an array of shape "
                "(t, d), or use vlm.RetrievalIndex"
            )
        if self.model is None and (texts or images):
            at = min(texts + images)
            raise ConfigError(
                f"{noun} {first + at} is a {type(items[at]).__name__}, and the index has no model: "
                "give an array of vectors of shape (t, d), or MultiVectorIndex(model)"
            )
        found: dict[int, np.ndarray] = {i: np.asarray(items[i], np.float32) for i in given}
        of_texts = _text_vectors if multi_vector_bundle(self.model) else text_tokens
        for at, encode in ((texts, of_texts), (images, image_tokens)):
            if at and self.model is not None:
                found |= dict(zip(at, encode(self.model, [items[i] for i in at]), strict=True))
        for i in range(len(items)):
            z, name = found[i], f"{noun} {first + i}"
            if not len(z):
                raise DataError(f"{name} has no vectors: leave it out")
            width = width or z.shape[1]
            if z.shape[1] != width:
                raise ConfigError(
                    f"{name} has vectors of {z.shape[1]} dimensions, and the others {width}: "
                    "encode all with one model"
                )
            found[i] = normalise(z, f"a vector of {name}")
        return [found[i] for i in range(len(items))]

    def _rows(self) -> np.ndarray:
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts)]
        return self._parts[0]

    def _nearest(self, queries: Queries, k: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        empty = [np.zeros(0, np.int64) for _ in queries], [np.zeros(0) for _ in queries]
        if not len(self) or not queries:
            return empty
        rows, found = self._rows(), ([], [])
        if self._mesh is not None:
            self._searcher = self._searcher or DeviceMaxSimilarity(rows, self._starts, self._mesh)
            return self._searcher.search(queries, k)
        for start in range(0, len(queries), QUERY_BLOCK):
            part = queries[start : start + QUERY_BLOCK]
            if self.coding is None:
                best = best_items(max_similarity(part, rows, self._starts), k)
            else:
                best = self._by_codes(part, rows, self.coding, k)
            found[0].extend(best[0])
            found[1].extend(best[1])
        return found

    def _by_codes(self, queries: Queries, rows: np.ndarray, coding: Coding, k: int):
        """Scan the codes, and score the best candidates exactly."""
        self._codes = self._codes or _coded(rows, coding)
        count = max(LEAST, CANDIDATES[coding] * k)
        values, scale = self._codes
        proposed, _ = best_items(max_similarity(queries, values, self._starts, scale), count)
        found: tuple[list[np.ndarray], list[np.ndarray]] = [], []
        for z, at in zip(queries, map(np.sort, proposed), strict=True):
            lengths = self._starts[at + 1] - self._starts[at]
            starts = np.concatenate([[0], np.cumsum(lengths)])
            picked = np.repeat(self._starts[at] - starts[:-1], lengths) + np.arange(starts[-1])
            (best,), (scores,) = best_items(max_similarity([z], rows[picked], starts), k)
            found[0].append(at[best])
            found[1].append(scores)
        return found


def _text_vectors(model: Bundle, texts: list[str]) -> Queries:
    return list(model.encode_text(texts)[:, None])


def _is_vectors(item: Any, dimensions: int = 2) -> bool:
    """Whether something is an array of floats with so many dimensions."""
    return getattr(item, "ndim", 0) == dimensions and is_float(item.dtype)


def _is_one(item: Any) -> bool:
    """Whether something is one item, not several."""
    if (dimensions := getattr(item, "ndim", 0)) and is_float(item.dtype):
        return dimensions < 3
    return is_image(item) or isinstance(item, str)


def _chunks(items: Iterator[Any]) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


class _Signs:
    """Rows of -1 and 1, stored as one bit each."""

    def __init__(self, bits: np.ndarray, width: int):
        self._bits, self.shape = bits, (len(bits), width)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return np.unpackbits(self._bits[rows], axis=1, count=self.shape[1]) * np.float32(2) - 1


def _coded(rows: np.ndarray, coding: Coding) -> tuple[Any, np.ndarray]:
    """Return codes of rows and their scales; a row is about code * scale.

    Binary codes are signs after subtracting the mean of the rows, which shifts the scores of all
    items equally.
    """
    centre = np.asarray(rows[:CODED_ROWS], np.float32).mean(0)
    values, scales = [], []
    for start in range(0, len(rows), CODED_ROWS):
        part = np.asarray(rows[start : start + CODED_ROWS], np.float32)
        if coding == "int8":
            code = codes.encode(part, "int8", centre)
            values.append(code.values)
            scales.append(code.scale)
        else:
            values.append(np.packbits(part > centre, axis=1))
            scales.append(np.abs(part - centre).mean(1))
    joined, scale = np.concatenate(values), np.concatenate(scales)
    return joined if coding == "int8" else _Signs(joined, rows.shape[1]), scale
