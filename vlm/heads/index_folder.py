"""File format of a saved index: immutable shards, and one small file that lists them.

    index.json           description of the index and its shards, in order; replaced atomically
    rows-ID.npy          (n, d) embeddings of a shard
    items-ID.json        their ids, and their metadata by column
    codes-ID.npy         compact codes, if the index has them (and scale-ID.npy for int8)
    removed-ID.npy       positions of rows that are no longer in the index
    index.lock           held by the process that saves; it stays in the folder

New shards are on disk before `index.json` lists them, and files that it no longer lists are deleted
last. A reader finds the old index or the new one at any moment, even if a save was killed.

A save holds the lock from start to end. It compares the generation in `index.json` with the one
that its index was loaded from, and refuses to replace another. No other save is in progress then,
so files that `index.json` does not list belong to saves that were killed.
"""

import contextlib
import functools
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from vlm._json import parse, to_json, without_strings
from vlm.errors import CheckpointError, ConfigError, ConflictError
from vlm.heads.codes import Codes
from vlm.heads.model_identity import FIELDS
from vlm.paths import as_config_error, is_remote
from vlm.weights.files import npy_header

try:
    import fcntl
except ImportError:  # Windows has no flock: only the generation protects a save
    fcntl = None

_log = logging.getLogger(__name__)

FORMAT = "vlm retrieval index"
VERSION = 2  # of the format; version 1, with a single shard, is still read
SHARD_ROWS = 1 << 18
WRITTEN_ROWS = 1 << 14  # rows copied at once
_MAX_LISTS = 10_000  # metadata columns

DESCRIPTION, LOCK = "index.json", "index.lock"
# Files that a save writes besides index.json; embeddings-ID.npy is from version 1.
OWN = re.compile(
    r"(rows|codes|scale|removed)-[0-9a-f]{12}\.npy|items-[0-9a-f]{12}\.json"
    r"|embeddings-[0-9A-Za-z]+\.npy|index\.json\.[0-9a-f]{8}"
)
LOCK_TIMEOUT = 10.0  # seconds that a save waits for another one


def local_folder(folder: str | os.PathLike) -> Path:
    """Return the path of an index folder, which must be local so that rows can be memory-mapped.

    Raises:
        ConfigError: a bucket.
    """
    if is_remote(folder):
        raise ConfigError(
            f"{os.fspath(folder)} is a bucket, and an index is memory-mapped from a local disk: "
            "name a local folder, and copy it to or from the bucket"
        )
    return Path(folder).expanduser()


def check_target(folder: Path) -> None:
    """Raise a CheckpointError if the target is a file, or a folder with other files."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: choose a folder for the index")
    if not folder.is_dir() or (folder / DESCRIPTION).is_file():
        return
    names = [file.name for file in folder.iterdir()]
    if any(name != LOCK and not OWN.fullmatch(name) for name in names):  # of a killed save
        raise CheckpointError(f"{folder} holds other files and no index: choose another folder")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Context manager that creates the folder and holds its lock, for one save at a time.

    The lock is `flock` on a file that is never deleted. The system releases it when the process
    ends for any reason, so a dead process blocks no other. The file names its owner.

    Raises:
        ConflictError: another save takes longer than LOCK_TIMEOUT.
        ConfigError: the folder cannot be written.
    """
    with as_config_error(f"the index {folder} cannot be written", "free the disk or name another"):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / LOCK, "a+", encoding="utf-8") as file:
            _lock(file, folder)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}" if fcntl else "")
            file.flush()
            yield


def _lock(file: Any, folder: Path) -> None:
    """Acquire the lock; log a warning if the file system does not support locks."""
    deadline = time.monotonic() + LOCK_TIMEOUT
    while fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.02)
                continue
            file.seek(0)
            owner = file.read() or "another process"
            raise ConflictError(
                f"{owner} has been saving to the index {folder} for more than "
                f"{LOCK_TIMEOUT:.0f} s: save again when it has finished"
            ) from None
        except OSError as error:
            _log.warning(
                "%s has no file locks (%s): let one process at a time save an index there",
                folder, error.strerror,
            )  # fmt: skip
            return


def write_shard(
    folder: Path,
    rows: Iterator[np.ndarray],
    shape: tuple[int, int],
    dtype: DTypeLike,
    items: dict[str, Any],
    codes: Codes | None,
) -> str:
    """Write one shard and return its name; `rows` yields pieces of the shard, in order."""
    name = uuid.uuid4().hex[:12]
    with open(folder / f"rows-{name}.npy", "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}
        np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})
        for piece in rows:
            file.write(np.ascontiguousarray(piece, dtype).data)
        _to_disk(file)
    with open(folder / f"items-{name}.json", "w", encoding="utf-8") as file:
        file.write(to_json(items))  # ASCII: a file name may not be valid UTF-8
        _to_disk(file)
    if codes is not None:
        parts = {"codes": codes.values} | ({} if codes.scale is None else {"scale": codes.scale})
        for part, values in parts.items():
            write_array(folder / f"{part}-{name}.npy", values)
    return name


def write_removed(folder: Path, positions: np.ndarray) -> str | None:
    """Write the positions of removed rows and return the name of their file, if there are any."""
    if not len(positions):
        return None
    name = f"removed-{uuid.uuid4().hex[:12]}.npy"
    write_array(folder / name, positions.astype(np.int64))
    return name


def write_array(file: Path, array: np.ndarray) -> None:
    """Write an array as .npy, to the disk itself."""
    with open(file, "wb") as out:
        np.save(out, array, allow_pickle=False)
        _to_disk(out)


def generation(folder: Path) -> str | None:
    """Return the generation of the index in a folder, "COUNT-RANDOM"; None if there is no index.

    Indexes of older versions without generations have "0".
    """
    try:
        text = (folder / DESCRIPTION).read_text(encoding="utf-8")
        return str(parse(text).get("generation", "0"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError):
        return "corrupt"  # differs from the generation of every loaded index


def publish(folder: Path, description: dict[str, Any]) -> str:
    """Write `description` as index.json, then delete the files that it does not list.

    The caller must hold the lock. Returns the new generation.
    """
    count = (generation(folder) or "0").partition("-")[0]
    new = f"{int(count) + 1 if count.isdecimal() else 1}-{uuid.uuid4().hex[:12]}"
    partial = folder / f"{DESCRIPTION}.{uuid.uuid4().hex[:8]}"
    head = {"format": FORMAT, "version": VERSION, "generation": new}
    with open(partial, "w", encoding="utf-8") as file:
        json.dump({**head, **description}, file, ensure_ascii=False)
        _to_disk(file)
    os.replace(partial, folder / DESCRIPTION)
    named = {shard["name"] for shard in description["shards"]}
    for old in folder.iterdir():
        kept = old.stem.partition("-")[2] in named or old.name == description["removed"]
        if OWN.fullmatch(old.name) and not kept:
            with contextlib.suppress(OSError):  # the next save deletes it
                old.unlink()
    return new


def read_description(folder: Path) -> dict[str, Any]:
    """Read and validate `index.json`; a CheckpointError if the folder has no valid index."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no index: give a folder that an index was saved to")
    meta = _json(path, parse)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} does not describe a vlm retrieval index: give the folder of one"
        )
    if meta.get("version") not in (1, VERSION):
        raise CheckpointError(
            f"{path} has version {meta.get('version')!r} and this vlm reads {VERSION}: "
            "install the vlm that wrote it, or rebuild the index"
        )
    fields: dict[str, type] = {**FIELDS, "embed_dim": int, "dtype": str}
    fields |= {"shards": list} if meta["version"] == VERSION else {"embeddings": str, "ids": list}
    for name, kind in fields.items():
        if not isinstance(meta.get(name), kind):
            raise CheckpointError(f"{path} has no valid {name!r}: rebuild the index")
    removed, centre = meta.get("removed"), meta.get("centre")
    if meta["dtype"] not in ("float32", "float16") or not isinstance(removed, str | None):
        raise CheckpointError(f"{path} has no valid 'dtype' or 'removed': rebuild the index")
    numbers = isinstance(centre, list) and all(type(x) in (int, float) for x in centre)
    if centre is not None and not (numbers and len(centre) == meta["embed_dim"]):
        raise CheckpointError(f"{path} has no valid 'centre': rebuild the index")
    # A model with one tower has one probe.
    if {len(meta["probe_text"]), len(meta["probe_image"])} - {0} != {meta["embed_dim"]}:
        raise CheckpointError(f"{folder} is corrupt (embedding widths differ): rebuild the index")
    return meta


def read_shards(folder: Path, meta: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield each shard: name (None in version 1), memory-mapped rows and codes, ids, columns.

    Raises:
        CheckpointError: files that are missing, corrupt, or inconsistent with their description.
    """
    if meta["version"] == 1:
        rows = mapped(folder / Path(meta["embeddings"]).name)
        _check(folder, meta, rows, meta.get("count"), len(meta["ids"]))
        _check_values(folder, meta["ids"], {})
        yield {"name": None, "rows": rows, "ids": meta["ids"], "columns": {}, "codes": None}
        return
    for shard in meta["shards"]:
        name = Path(str(shard.get("name") if isinstance(shard, dict) else None)).name
        rows = mapped(folder / f"rows-{name}.npy")
        parse_items = functools.partial(_parse_items, rows=len(rows))
        items = _json(folder / f"items-{name}.json", parse_items)
        usable = isinstance(items, dict) and isinstance(items.get("ids"), list)
        columns = items.get("columns", {}) if usable else None
        if not isinstance(columns, dict) or any(
            not isinstance(column, list) or len(column) != len(items["ids"])
            for column in columns.values()
        ):
            raise CheckpointError(f"{folder / f'items-{name}.json'} is corrupt: rebuild the index")
        _check(folder, meta, rows, shard.get("count"), len(items["ids"]))
        _check_values(folder / f"items-{name}.json", items["ids"], columns)
        codes = _codes(folder, name, meta, len(rows)) if meta.get("coding") else None
        yield {"name": name, "rows": rows, "ids": items["ids"], "columns": columns, "codes": codes}


def read_removed(folder: Path, meta: dict[str, Any], count: int) -> np.ndarray:
    """Read the positions of removed rows, which must be below `count`."""
    if not meta.get("removed"):
        return np.zeros(0, np.int64)
    removed = mapped(folder / Path(meta["removed"]).name)
    whole = removed.ndim == 1 and removed.dtype == np.int64 and len(removed) <= count
    if not whole or ((removed < 0) | (removed >= count)).any():
        raise CheckpointError(f"{folder} is corrupt ({meta['removed']} has invalid positions)")
    return np.array(removed)


def _codes(folder: Path, name: str, meta: dict[str, Any], count: int) -> Codes:
    """Read the codes of a shard."""
    signs = meta["coding"] == "binary"
    scale = None if signs else mapped(folder / f"scale-{name}.npy")
    values = mapped(folder / f"codes-{name}.npy")
    shape = (count, -(-meta["embed_dim"] // 32) if signs else meta["embed_dim"])
    if values.shape != shape or values.dtype != (np.uint32 if signs else np.int8):
        raise CheckpointError(f"{folder} is corrupt (codes and rows differ): rebuild the index")
    if scale is not None and (scale.shape != (count,) or scale.dtype != np.float32):
        raise CheckpointError(f"{folder} is corrupt (scales and rows differ): rebuild the index")
    return Codes(np.array(values), scale)


def _check(folder: Path, meta: dict[str, Any], rows: np.ndarray, count: Any, ids: int) -> None:
    described = (count, meta["embed_dim"])
    if rows.shape != described or ids != len(rows) or rows.dtype != meta["dtype"]:
        raise CheckpointError(
            f"{folder} is corrupt ({ids} ids and {rows.dtype} embeddings of shape {rows.shape}, "
            f"described as {meta['dtype']} {described}): rebuild the index"
        )


def _check_values(file: Path, ids: list[Any], columns: dict[str, list[Any]]) -> None:
    """Check that ids are texts and integers, and metadata texts and numbers."""
    good = set(map(type, ids)) <= {str, int}
    for column in columns.values():
        good = good and set(map(type, column)) <= {str, int, float, bool, type(None)}
    if not good:
        raise CheckpointError(
            f"{file} is corrupt (an id or a value is no text and no number): rebuild the index"
        )


def _parse_items(text: str, rows: int) -> Any:
    """Parse the file of a shard's items, unless it has more values than belong to its rows."""
    for counted in (text, without_strings(text)):  # most names have none of the characters
        lists, objects = counted.count("["), counted.count("{")
        if lists <= _MAX_LISTS and objects <= 2 and counted.count(",") <= (rows + 1) * (lists + 1):
            return parse(text, most=len(text))
    raise ValueError("it has more values than its rows have")


def mapped(file: Path, fix: str = "rebuild the index") -> np.ndarray:
    """Memory-map an array of a file that may come from anybody.

    Raises:
        CheckpointError: the file is missing or corrupt; `fix` ends the message.
    """
    try:
        with open(file, "rb") as stream:
            npy_header(stream)
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): {fix}") from None


def _json(path: Path, parse_text: Callable[[str], Any]) -> Any:
    try:
        return parse_text(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): rebuild the index") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): rebuild the index") from None


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
