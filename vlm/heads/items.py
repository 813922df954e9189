"""Items of an index: ids, metadata and embeddings, in memory or memory-mapped from a folder."""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlm.errors import CheckpointError, ConfigError, ConflictError
from vlm.heads import index_folder, pruned_search
from vlm.heads.codes import CANDIDATES, Codes, Coding, encode
from vlm.heads.filters import Value
from vlm.heads.image_paths import absolute, is_image_path, is_relative, relocated

SMALL = 8192  # rows: neighbouring blocks of at most so many in total are joined
LARGE = 1 << 16  # rows of an index that gets bounds: smaller ones are searched quickly without
MOST_REMOVED, MOST_SHARDS = 0.25, 64  # beyond these a save rewrites all shards

Id = str | int
GivenId = Id | np.integer | os.PathLike[str]  # types that are converted to an id
Stored = Literal["float32", "float16"]  # dtype of stored embeddings


@dataclass
class Block:
    """Block of rows that were added together; `name` is their shard in the folder, if any."""

    rows: np.ndarray
    codes: Codes | None
    name: str | None = None
    bounds: pruned_search.Bounds | None = None

    def __len__(self) -> int:
        return len(self.rows)


class Items:
    """Items of an index by position. A removed item keeps its position until a save drops it.

    Attributes:
        ids, columns, live: for every position its id, its metadata, and False if it was removed.
        at: the position of each live id.
        blocks: the embeddings, in order.
        centre: (d,), subtracted before the signs of binary codes are taken.
    """

    def __init__(self, dtype: Stored, coding: Coding | None):
        self.dtype: Stored = dtype
        self.coding: Coding | None = coding
        self.ids: list[Id] = []
        self.columns: dict[str, list[Value]] = {}
        self.live = np.zeros(0, bool)
        self.at: dict[Id, int] = {}
        self.blocks: list[Block] = []
        self.centre: np.ndarray | None = None
        self.next_number = 0  # above every integer id and every position so far
        self.folder: Path | None = None  # of the blocks that have a name
        self.generations: dict[Path, str] = {}  # by folder: the one last loaded or saved there
        self.removed: set[Id] = set()  # ids removed since then
        self.moved: dict[str, str] = {}  # folders of images that were relocated since then

    @property
    def embed_dim(self) -> int | None:
        return self.blocks[0].rows.shape[1] if self.blocks else None

    @property
    def rows(self) -> list[np.ndarray]:
        return [block.rows for block in self.blocks]

    @property
    def codes(self) -> list[Codes]:
        return [block.codes for block in self.blocks if block.codes is not None]

    def bounds(self) -> list[pruned_search.Bounds | None]:
        """Return the pruning bounds of each block; each call adds them to one more block.

        Encoding a block takes as long as about fifteen searches, so it is spread over several.
        Memory-mapped blocks get none, because bounds would be held in memory.
        """
        if self.coding is None and len(self.ids) >= LARGE:
            for block in self.blocks:
                mapped = isinstance(block.rows, np.memmap)
                if block.bounds is None and not mapped and len(block) >= pruned_search.LEAST_ROWS:
                    if pruned_search.cpu_device() is not None:
                        block.bounds = pruned_search.Bounds(block.rows)
                    break
        return [block.bounds for block in self.blocks]

    def known(self, id: GivenId) -> Id | None:
        """Return the id of an item; a path may be relative, and its id absolute. None: unknown."""
        name: Any = os.fspath(id) if isinstance(id, os.PathLike) else id
        try:
            if name in self.at:
                return name
        except TypeError:  # not hashable
            return None
        full = absolute(name) if is_relative(name) else None
        return full if full in self.at else None

    def position(self, id: GivenId) -> int:
        """Return the position of an id, as `known` finds it.

        Raises:
            ConfigError: an unknown id.
        """
        name = self.known(id)
        if name is None:
            raise ConfigError(f"the index has no id {id!r}: `ids` lists those it has")
        return self.at[name]

    def relocate(self, folders: Mapping[str, str], strict: bool = True) -> None:
        """Change the ids of images that moved to other folders; see `image_paths.relocated`.

        Raises:
            ConfigError: two images would have the same path; if strict, no image is in a folder.
        """
        ids, unused = relocated(self.ids, folders)
        at = {ids[i]: int(i) for i in np.flatnonzero(self.live)}
        if strict and unused:
            there = next(filter(is_image_path, self.ids), None)
            fix = "its ids are no paths of images" if there is None else f"one is {there}"
            raise ConfigError(f"no image of the index lies in {min(unused)!r}: {fix}")
        if len(at) != len(self.at):
            raise ConfigError(f"{dict(folders)} give two images the same path: name other folders")
        self.ids, self.at, self.moved = ids, at, self.moved | dict(folders)

    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """Copy the rows at these positions, in this order, in their stored dtype."""
        out = np.empty((len(positions), self.embed_dim or 0), self.dtype)
        start = 0
        for block in self.blocks:
            here = (positions >= start) & (positions < start + len(block))
            if here.any():
                out[here] = block.rows[positions[here] - start]
            start += len(block)
        return out

    def unsaved(self) -> np.ndarray:
        """Return the positions of items added or replaced since the index was saved or loaded."""
        new = [np.full(len(block), block.name is None) for block in self.blocks]
        return np.flatnonzero(self.live & np.concatenate([*new, np.zeros(0, bool)]))

    def add(self, rows: list[np.ndarray], ids: list[Id], columns: dict[str, list[Value]]) -> None:
        """Append validated items; an item replaces the existing one with its id.

        It keeps the metadata of the replaced item in columns that are not given.
        """
        if not ids:
            return
        if self.coding and self.centre is None:
            self.centre = np.asarray(rows[0], np.float32).mean(axis=0)
        blocks = [Block(z, self._codes_of(z)) for z in rows]
        count = len(self.ids)
        for name in columns:
            self.columns.setdefault(name, [None] * count)
        before = [self.at.get(name) for name in ids]
        for name, column in self.columns.items():
            column += columns.get(name) or [None if i is None else column[i] for i in before]
        replaced = [i for i in before if i is not None]
        self.live = np.concatenate([self.live, np.ones(len(ids), bool)])
        self.live[replaced] = False
        self.ids += ids
        self.removed.difference_update(ids)
        self._count_on(ids)
        self.at |= zip(ids, range(count, count + len(ids)), strict=True)
        self.blocks += blocks

    def _count_on(self, ids: list[Id]) -> None:
        numbers = (1 + name for name in ids if isinstance(name, int))
        self.next_number = max(self.next_number, len(self.ids), max(numbers, default=0))

    def remove(self, ids: Iterable[Any]) -> None:
        """Remove items; with an unknown id, nothing is removed."""
        positions = [self.position(id) for id in ids]
        ids = [self.ids[at] for at in positions]
        self.live[positions] = False
        for name in ids:
            self.at.pop(name, None)
        self.removed.update(ids)

    def join_small_blocks(self) -> None:
        """Join neighbouring small blocks that have not been saved."""
        joined: list[Block] = []
        for block in self.blocks:
            last = joined[-1] if joined else None
            if last and not (last.name or block.name) and len(last) + len(block) <= SMALL:
                rows = np.concatenate([last.rows, block.rows])
                joined[-1] = Block(rows, self._codes_of(rows))
            else:
                joined.append(block)
        self.blocks = joined

    def _codes_of(self, rows: np.ndarray) -> Codes | None:
        if self.coding is None:
            return None
        assert self.centre is not None  # set with the first rows
        return encode(rows, self.coding, self.centre)

    def save(self, folder: Path, model: dict[str, Any], overwrite: bool) -> None:
        """Write new shards, publish the index, and memory-map its rows from the folder.

        Args:
            folder: new, empty, or of an index.
            model: the identity of the model, see `vlm.heads.model_identity`.
            overwrite: replace an index that this one was not loaded from or last saved to.

        Raises:
            ConflictError: the folder holds such an index. Then nothing is changed.
        """
        with index_folder.writing(folder):
            place = folder.resolve()
            stored, loaded = index_folder.generation(folder), self.generations.get(place)
            if stored not in (None, loaded) and not overwrite:
                raise ConflictError(_conflict(folder, loaded))
            rewrite = not self._can_append(folder)
            blocks = self._write_all(folder) if rewrite else self._write_new(folder)
            removed = np.flatnonzero(~self.live)[: 0 if rewrite else None]
            described = {
                **model,
                "embed_dim": self.embed_dim,
                "dtype": self.dtype,
                "coding": self.coding,
                "centre": None if self.centre is None else self.centre.tolist(),
                "shards": [{"name": block.name, "count": len(block)} for block in blocks],
                "removed": index_folder.write_removed(folder, removed),
            }
            self.generations[place] = index_folder.publish(folder, described)
        # Only after a successful save: a failed one leaves the items unchanged and unsaved.
        if rewrite:
            self._drop_removed()
        self.blocks, self.folder = blocks, place
        self.removed.clear()
        self.moved.clear()

    def _can_append(self, folder: Path) -> bool:
        """Whether a save to this folder only adds shards, instead of rewriting all items."""
        shards = [block.name for block in self.blocks if block.name]
        few = len(shards) < MOST_SHARDS
        few_removed = len(self.ids) - len(self.at) <= MOST_REMOVED * len(self.ids)
        same_folder = self.folder == folder.resolve()
        complete = same_folder and all((folder / f"rows-{name}.npy").is_file() for name in shards)
        return complete and few and few_removed and not self.moved

    def _write_all(self, folder: Path) -> list[Block]:
        live = np.flatnonzero(self.live)
        cuts = range(0, len(live), index_folder.SHARD_ROWS)
        return [self._shard(folder, live[i : i + index_folder.SHARD_ROWS]) for i in cuts]

    def _drop_removed(self) -> None:
        live = np.flatnonzero(self.live)
        self.ids = [self.ids[i] for i in live]
        self.columns = {n: [c[i] for i in live] for n, c in self.columns.items()}
        self.at = {name: i for i, name in enumerate(self.ids)}
        self.live = np.ones(len(live), bool)

    def _write_new(self, folder: Path) -> list[Block]:
        blocks, start = [], 0
        for saved, group in itertools.groupby(self.blocks, lambda block: block.name is not None):
            group = list(group)
            count = sum(map(len, group))
            if saved:
                blocks += group
            else:
                cuts = range(start, start + count, index_folder.SHARD_ROWS)
                ends = (min(i + index_folder.SHARD_ROWS, start + count) for i in cuts)
                pairs = zip(cuts, ends, strict=True)
                blocks += [self._shard(folder, np.arange(i, end)) for i, end in pairs]
            start += count
        return blocks

    def _shard(self, folder: Path, positions: np.ndarray) -> Block:
        """Write the items at these positions as one shard and open it."""

        def pieces() -> Iterator[np.ndarray]:
            for i in range(0, len(positions), index_folder.WRITTEN_ROWS):
                yield self.rows_at(positions[i : i + index_folder.WRITTEN_ROWS])

        codes = self._codes_at(positions)
        items = {
            "ids": [self.ids[i] for i in positions],
            "columns": {n: [c[i] for i in positions] for n, c in self.columns.items()},
        }
        shape = (len(positions), self.embed_dim or 0)
        name = index_folder.write_shard(folder, pieces(), shape, self.dtype, items, codes)
        return Block(index_folder.mapped(folder / f"rows-{name}.npy"), codes, name)

    def _codes_at(self, positions: np.ndarray) -> Codes | None:
        if self.coding is None:
            return None
        values = np.concatenate([codes.values for codes in self.codes])[positions]
        scales = [codes.scale for codes in self.codes if codes.scale is not None]
        return Codes(values, np.concatenate(scales)[positions] if scales else None)

    @classmethod
    def load(cls, folder: Path) -> "tuple[Items, dict[str, Any]]":
        """Open the items of a saved index, and return them with its description.

        Raises:
            CheckpointError: no index, or a corrupt one.
        """
        for left in reversed(range(10)):
            meta = index_folder.read_description(folder)
            try:
                return cls.open(folder, meta), meta
            except CheckpointError:  # retry if another process replaced it while it was read
                if not left or index_folder.read_description(folder) == meta:
                    raise
        raise AssertionError

    @classmethod
    def open(cls, folder: Path, meta: dict[str, Any]) -> "Items":
        """Open the items of a saved index.

        Args:
            folder: of the index.
            meta: its description.

        Raises:
            CheckpointError: corrupt files.
        """
        coding = meta.get("coding")
        if coding not in (None, *CANDIDATES) or (coding and meta.get("centre") is None):
            raise CheckpointError(f"{folder} has codes of an unknown kind: rebuild the index")
        items = cls(meta["dtype"], coding)
        items.centre = np.asarray(meta["centre"], np.float32) if coding else None
        for shard in index_folder.read_shards(folder, meta):
            count = len(items.ids)
            for name in dict.fromkeys([*items.columns, *shard["columns"]]):  # in their order
                column = items.columns.setdefault(name, [None] * count)
                column += shard["columns"].get(name, [None] * len(shard["ids"]))
            items.ids += shard["ids"]
            items.blocks.append(Block(shard["rows"], shard["codes"], shard["name"]))
        items.live = np.ones(len(items.ids), bool)
        items.live[index_folder.read_removed(folder, meta, len(items.ids))] = False
        items.at = {items.ids[i]: int(i) for i in np.flatnonzero(items.live)}
        if len(items.at) != items.live.sum():
            raise CheckpointError(f"{folder} is corrupt (duplicate ids): rebuild the index")
        items.folder = folder.resolve()
        items.generations[items.folder] = str(meta.get("generation", "0"))
        items._count_on(items.ids)
        return items


def _conflict(folder: Path, known: str | None) -> str:
    """Make the message of a ConflictError: why an index may not be saved, and the fix."""
    if known is None:
        return (
            f"{folder} holds an index that this one was not loaded from: load that one and merge "
            "this one into it, choose another folder, or replace it with save(..., overwrite=True)"
        )
    return (
        f"another process saved to {folder} since this index was loaded or saved there: call "
        "reload() on this index, which keeps what is unsaved in it, and save again"
    )
