"""Retrieval: an exact nearest-neighbour index over embeddings, on disk and in bounded memory."""

import itertools
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from jaxtyping import Float

from vlm.errors import CheckpointError, ConfigError
from vlm.heads import show
from vlm.heads.inputs import SUFFIXES, Kind, default_id, kind, split
from vlm.heads.prompts import normalise

VERSION = 1  # of the folder's format
CHUNK = 8192  # items encoded before their embeddings are stored
TILE_BYTES = 64 << 20  # of stored rows multiplied at once, in float32
QUERY_BLOCK = 256

# What an index remembers of its model: the embeddings of these two. Equal weights give them again
# under any name and in any format; a model that was trained further does not, whatever its name.
PROBE_TEXT = "a photo of a red car in the snow"
PROBE_IMAGE = np.add.outer(np.arange(0, 256, 4), np.arange(64)).astype(np.uint8)[..., None] * (
    np.array([1, 2, 3], np.uint8)
)
SAME = 0.999  # the least cosine of a probe with itself across machines and precisions


class Hit(NamedTuple):
    """One answer: the id it was added under, and its cosine with the query."""

    id: str | int
    score: float


class Hits(list[Hit]):
    """The answers to one query, best first."""

    def _repr_html_(self) -> str:
        cards = []
        for hit in self:
            on_disk = isinstance(hit.id, str) and os.path.splitext(hit.id)[1].lower() in SUFFIXES
            picture = show.thumbnail(hit.id) if on_disk else ""
            cards.append(show.card(picture, show.bars([(str(hit.id), hit.score)])))
        return f"<div>{''.join(cards) or 'no hits'}</div>"


class RetrievalIndex:
    """Finds the images or texts nearest to a text, an image or an embedding, exactly.

    A `str` is always a text; a picture is a `pathlib.Path`, a PIL image or an array of pixels.

    Args:
        model: what `vlm.load` gives.
        dtype: of the stored embeddings; float16 halves the memory, moves a cosine by under
            1e-3, and is slower to search on a CPU.
    """

    def __init__(self, model: Any, dtype: Literal["float32", "float16"] = "float32"):
        if dtype not in ("float32", "float16"):
            raise ConfigError(f"dtype is {dtype!r}: an index stores 'float32' or 'float16'")
        self.model, self.dtype = model, dtype
        self._ids: list[str | int] = []
        self._known: set[str | int] = set()
        self._rows: list[np.ndarray] = []  # (n_i, d) each; the first may be mapped from disk

    # ------------------------------------------------------------------------------- adding

    def add(
        self, items: Any, ids: Iterable[str | int] | None = None, batch_size: int | None = None
    ) -> None:
        """Encode and store images, texts or embeddings, from any iterable, in bounded memory.

        An `add` that fails leaves the index as it was.

        Args:
            items: all pictures, all texts or all embeddings; one alone is taken too.
            ids: a name for each, texts or integers; by default the path of a picture on disk, or
                else its running number in the index.
            batch_size: of encoding images; None leaves it to the model.

        Raises:
            ConfigError: an id given twice or already in the index, another number of ids than
                items, items of several kinds, or a `str` that names a picture on this disk.
            DataError: an embedding that is zero or not finite.
        """
        what, stream, single = split(items, "add")
        if single and isinstance(ids, str | int):
            ids = [ids]
        if isinstance(ids, str):
            raise ConfigError(f"ids is the text {ids!r}: give a list with one id per item")
        new_ids: list[str | int] = []
        fresh: set[str | int] = set()
        stream = self._named(stream, what, iter(ids) if ids is not None else None, new_ids, fresh)
        rows = []
        while True:
            head = list(itertools.islice(stream, 1))
            if not head:
                break
            chunk = itertools.chain(head, itertools.islice(stream, CHUNK - 1))
            z = self._encode(chunk, what, batch_size)
            if self._rows and z.shape[1] != self.embed_dim:
                raise ConfigError(
                    f"embeddings of {z.shape[1]} dimensions do not fit an index of "
                    f"{self.embed_dim}: encode them with {self.model.name}"
                )
            rows.append(z.astype(self.dtype))
        self._rows += rows
        self._ids += new_ids
        self._known |= fresh

    def _named(
        self,
        stream: Iterator[Any],
        what: Kind | None,
        ids: Iterator[Any] | None,
        new_ids: list[str | int],
        fresh: set[str | int],
    ) -> Iterator[Any]:
        """The items as they pass, each with its kind checked and its id noted in `new_ids`."""
        for number, item in enumerate(stream):
            if (found := kind(item, "add")) != what:
                raise ConfigError(
                    f"add got {what}s and, as item {number}, {found}: add them in separate calls"
                )
            if ids is None:
                name = default_id(item, len(self) + number)
            else:
                name = next(ids, None)
                if name is None:
                    raise ConfigError(f"there are only {number} ids: give one for every item")
            name = int(name) if isinstance(name, np.integer) else name
            name = os.fspath(name) if isinstance(name, os.PathLike) else name
            if not isinstance(name, str | int) or isinstance(name, bool):
                raise ConfigError(f"id {name!r} of item {number} is no text and no integer")
            if name in self._known or name in fresh:
                raise ConfigError(
                    f"id {name!r} is in the index already: ids name one item each, "
                    "so give `ids` of your own or leave the item out"
                )
            fresh.add(name)
            new_ids.append(name)
            yield item
        if ids is not None and next(ids, None) is not None:
            raise ConfigError(f"there are more ids than the {len(new_ids)} items: give one each")

    def _encode(
        self, items: Iterable[Any], what: Kind | None, batch_size: int | None = None
    ) -> Float[np.ndarray, "n d"]:
        if what == "text":
            z = self.model.encode_text(list(items))
        elif what == "image":
            options = {} if batch_size is None else {"batch_size": batch_size}
            z = self.model.encode_image(items, **options)
        else:
            rows = [np.asarray(item, np.float32) for item in items]
            if len({row.shape for row in rows}) > 1:
                raise ConfigError("the embeddings have several widths: encode all with one model")
            z = np.stack(rows)
        return normalise(z, f"the embedding of an item ({what})")

    # ---------------------------------------------------------------------------- searching

    def search(self, query: Any, k: int = 5) -> Hits | list[Hits]:
        """The k nearest items by cosine, best first; equals in the order they were added.

        Args:
            query: a text, a picture or an embedding; or a list of one of these (or an (n, d)
                array), which gives a list of results.
            k: answers per query; all of the index if it holds fewer.

        Raises:
            ConfigError: a k below 1, a query of no known kind or of another width, or a `str` that
                names a picture on this disk.
        """
        if k < 1:
            raise ConfigError(f"k is {k}: ask for at least one answer")
        what, stream, single = split(query, "search")
        queries = list(stream)
        for i, item in enumerate(queries):
            if (found := kind(item, "search")) != what:
                raise ConfigError(f"query {i} is {found}, the first is {what}: search them apart")
        if not queries:
            return []
        z = self._encode(queries, what)
        if self._rows and z.shape[1] != self.embed_dim:
            raise ConfigError(
                f"a query of {z.shape[1]} dimensions does not fit an index of {self.embed_dim}: "
                f"encode it with {self.model.name}"
            )
        results = []
        for start in range(0, len(z), QUERY_BLOCK):
            positions, scores = top_k(z[start : start + QUERY_BLOCK], self._rows, k)
            for row, values in zip(positions, scores, strict=True):
                pairs = zip(row.tolist(), values.tolist(), strict=True)
                results.append(Hits(Hit(self._ids[i], s) for i, s in pairs))
        return results[0] if single else results

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> tuple[str | int, ...]:
        """The ids, in the order in which they were added."""
        return tuple(self._ids)

    @property
    def embed_dim(self) -> int | None:
        """The width of the embeddings; None while the index is empty."""
        return self._rows[0].shape[1] if self._rows else None

    def __repr__(self) -> str:
        size = sum(rows.nbytes for rows in self._rows) / 2**20
        width = f" x {self.embed_dim}" if self._rows else ""
        return (
            f"RetrievalIndex({self.model.name}, {len(self):,}{width} {self.dtype}, {size:.1f} MiB)"
        )

    # --------------------------------------------------------------------- saving and loading

    def save(self, folder: str | os.PathLike) -> None:
        """Write the index to a folder, or over the index that is there.

        The embeddings go to a file of a new name and `index.json`, which names it, is replaced at
        the end: whoever opens the folder at any moment finds the old index or the new one, whole.

        Raises:
            CheckpointError: the folder holds something else.
            ConfigError: the index is empty.
        """
        folder = Path(folder)
        if not self._rows:
            raise ConfigError(f"the index is empty: add items before saving it to {folder}")
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{folder} is a file: choose a folder for the index")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / "index.json").is_file():
            raise CheckpointError(f"{folder} holds other files and no index: choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        name = f"embeddings-{uuid.uuid4().hex[:12]}.npy"
        out = np.lib.format.open_memmap(
            folder / name, mode="w+", dtype=self.dtype, shape=(len(self), self.embed_dim)
        )
        np.concatenate(self._rows, out=out)
        out.flush()
        del out
        meta = {
            "format": "vlm retrieval index",
            "version": VERSION,
            "model": self.model.name,
            "fingerprint": getattr(self.model, "fingerprint", None),
            "embed_dim": self.embed_dim,
            "dtype": self.dtype,
            "count": len(self),
            "embeddings": name,
            "probe_text": self.model.encode_text([PROBE_TEXT])[0].tolist(),
            "probe_image": self.model.encode_image([PROBE_IMAGE])[0].tolist(),
            "ids": self._ids,
        }
        partial = folder / f"{name}.json"
        partial.write_text(json.dumps(meta), encoding="utf-8")
        os.replace(partial, folder / "index.json")
        for old in folder.glob("embeddings-*.npy*"):
            if old.name != name:
                old.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: str | os.PathLike, model: Any) -> Self:
        """Open a saved index; the embeddings stay on disk, mapped, until a search reads them.

        Raises:
            CheckpointError: no index there, a torn or foreign one, or one of another model.
        """
        folder = Path(folder)
        meta = _read_meta(folder)
        file = folder / Path(meta["embeddings"]).name  # never outside of the folder
        try:
            rows = np.load(file, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({error}): build the index again"
            ) from None
        ids = meta["ids"]
        described = (meta["count"], meta["embed_dim"])
        widths = {len(meta["probe_text"]), len(meta["probe_image"]), meta["embed_dim"]}
        if (
            rows.shape != described
            or len(ids) != len(rows)
            or rows.dtype != meta["dtype"]
            or len(widths) > 1
        ):
            raise CheckpointError(
                f"{folder} is torn: {len(ids)} ids and {rows.dtype} embeddings of shape "
                f"{rows.shape}, described as {meta['dtype']} {described}: build the index again"
            )
        _check_model(meta, model, folder)
        index = cls(model, rows.dtype.name)
        index._ids, index._known, index._rows = ids, set(ids), [rows]
        return index


def top_k(
    z_query: Float[np.ndarray, "q d"], blocks: Iterable[Float[np.ndarray, "n d"]], k: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Positions and scores of the k largest products per query, over rows given in blocks.

    Exact; equal scores keep the order of the rows. Memory: one tile of rows in float32 and its
    products, whatever the size of the index.
    """
    best_at = [np.zeros(0, np.int64)] * len(z_query)
    best = [np.zeros(0, np.float32)] * len(z_query)
    floor = np.full(len(z_query), -np.inf, np.float32)  # what a new row must exceed to enter
    start = 0
    for block in blocks:
        step = max(1, TILE_BYTES // (4 * max(block.shape[1], len(z_query))))
        for offset in range(0, len(block), step):
            tile = np.asarray(block[offset : offset + step], np.float32)
            products = z_query @ tile.T
            for q in np.flatnonzero(products.max(axis=1) > floor):
                row = products[q]
                new = np.flatnonzero(row > floor[q])
                if len(new) > k:  # the k-th largest, and all that equal it, before the sort
                    new = new[row[new] >= np.partition(row[new], -k)[-k]]
                scores = np.concatenate([best[q], row[new]])
                order = np.argsort(-scores, kind="stable")[:k]
                best[q] = scores[order]
                best_at[q] = np.concatenate([best_at[q], new + start + offset])[order]
                if len(order) == k:
                    floor[q] = best[q][-1]
        start += len(block)
    return best_at, best


def _read_meta(folder: Path) -> dict[str, Any]:
    """The description of a saved index, or a CheckpointError that says why there is none."""
    path = folder / "index.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no index: give a folder that an index was saved to")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): build the index again") from None
    if not isinstance(meta, dict) or meta.get("format") != "vlm retrieval index":
        raise CheckpointError(f"{path} does not describe a retrieval index of vlm: give its folder")
    if meta.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {meta.get('version')!r} and this vlm reads {VERSION}: "
            "install the vlm that wrote it, or build the index again"
        )
    for name, types in {
        "model": str, "embed_dim": int, "count": int, "embeddings": str, "ids": list,
        "dtype": str, "probe_text": list, "probe_image": list,
    }.items():  # fmt: skip
        if not isinstance(meta.get(name), types):
            raise CheckpointError(f"{path} has no usable {name!r}: build the index again")
    return meta


def _check_model(meta: dict[str, Any], model: Any, folder: Path) -> None:
    """Raise a CheckpointError unless `model` embeds as the index's own model did."""
    mend = f"load {meta['model']!r} as it was, or build the index again with {model.name!r}"
    z_text = np.asarray(model.encode_text([PROBE_TEXT]), np.float32)[0]
    if len(z_text) != meta["embed_dim"]:
        raise CheckpointError(
            f"{folder} holds embeddings of {meta['embed_dim']} dimensions and the model "
            f"{model.name!r} makes {len(z_text)}: {mend}"
        )
    same = float(z_text @ np.asarray(meta["probe_text"], np.float32)) >= SAME
    fingerprint = getattr(model, "fingerprint", None)
    if same and (fingerprint is None or fingerprint != meta.get("fingerprint")):
        # Two models may share a text tower. Equal files need no such proof, so that a text search
        # does not have to compile the image tower.
        z_image = np.asarray(model.encode_image([PROBE_IMAGE]), np.float32)[0]
        same = float(z_image @ np.asarray(meta["probe_image"], np.float32)) >= SAME
    if not same:
        raise CheckpointError(
            f"{folder} was built by the model {meta['model']!r}, and {model.name!r} embeds "
            f"differently: {mend}"
        )
