"""CLIP scores of examples, as `vlm data score` writes them, joined to the examples for filters.

FOLDER/scores.json           the model, the data, the number of parts; when complete, totals
FOLDER/part-00000.parquet    columns `key` and `clip_score`; null for an example without a score

The key of an example is its place in the data: file and row, or file and name in a tar. The folder
of the data is not part of it, so scores stay valid if the data moves. For the join, scores are kept
in the cache folder as an array sorted by a hash of the key; all processes share its pages.
"""

import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from vlm.config import DataConfig
from vlm.data.examples import SCORE, WHERE, Example
from vlm.data.faults import BadSample
from vlm.data.storage import hashed_path, open_file, read_file, write_whole
from vlm.errors import DataError, first_line

FILE = "scores.json"

_ROW = np.dtype([("hash", "<u8"), ("score", "<f4")])


def key_of(example: Example, config: DataConfig) -> str:
    """Return the key of an example: its place in the data of `config`."""
    return example[WHERE].replace(_root(config.source), "", 1)


def scored(example: Example, config: DataConfig) -> Example:
    """Add the score of `config.scores` to an example, if it has one.

    Raises:
        BadSample: the table does not list the example.
        DataError: the table is missing, incomplete or corrupt.
    """
    if config.scores is None:
        return example
    table, key = _table(config.scores), key_of(example, config)
    wanted = _hash(key)
    row = int(np.searchsorted(table["hash"], wanted))
    if row == len(table) or table["hash"][row] != wanted:
        raise BadSample(
            "no score",
            example[WHERE],
            f"{config.scores} has no score of {example[WHERE]}: run vlm data score on this data",
        )
    score = float(table["score"][row])
    return example if np.isnan(score) else {**example, SCORE: score}


def read_about(folder: str) -> dict[str, Any]:
    """Read `scores.json` of a complete folder; DataError if it is missing or incomplete."""
    try:
        about = json.loads(read_file(f"{folder.rstrip('/')}/{FILE}"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.scores {folder!r} has no {FILE} ({first_line(error)}): write it with "
            "vlm data score"
        ) from None
    if "digest" not in about:
        raise DataError(f"data.scores {folder!r} is incomplete: run the same vlm data score again")
    return about


def digest_of(folder: str) -> str:
    """Return the hash of all scores in a complete folder."""
    return read_about(folder)["digest"]


def part_path(folder: str, number: int) -> str:
    """Return the path of a part."""
    return f"{folder.rstrip('/')}/part-{number:05d}.parquet"


def write_part(folder: str, number: int, rows: list[tuple[str, float | None]]) -> None:
    """Write a part; it appears when it is complete."""
    table = pyarrow.table(
        {
            "key": pyarrow.array([key for key, _ in rows], pyarrow.string()),
            SCORE: pyarrow.array([score for _, score in rows], pyarrow.float32()),
        }
    )
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out)
    write_whole(part_path(folder, number), out.getvalue())


def read_parts(folder: str, count: int) -> Iterator[pyarrow.Table]:
    """Yield the rows of all parts; DataError if one is missing or corrupt."""
    for number in range(count):
        path = part_path(folder, number)
        try:
            with open_file(path) as file:
                yield pyarrow.parquet.read_table(file, columns=["key", SCORE])
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(
                f"{path} cannot be read ({first_line(error)}): remove it and {FILE} beside it, and "
                "run vlm data score again"
            ) from None


@functools.lru_cache(8)
def _table(folder: str) -> np.ndarray:
    """Return the scores of a folder sorted by the hash of the key, memory-mapped."""
    about = read_about(folder)
    path = hashed_path(about["digest"].encode(), ".scores.npy")
    if not os.path.exists(path):
        out = io.BytesIO()
        np.save(out, _sorted(folder, about["parts"]))
        write_whole(path, out.getvalue())
    return np.load(path, mmap_mode="r")


def _sorted(folder: str, count: int) -> np.ndarray:
    blocks = [np.empty(0, _ROW)]
    for table in read_parts(folder, count):
        block = np.empty(len(table), _ROW)
        block["hash"] = [_hash(key) for key in table["key"].to_pylist()]
        block["score"] = table[SCORE].to_numpy()  # NaN for null
        blocks.append(block)
    rows = np.concatenate(blocks)
    rows.sort(order="hash")
    same = np.flatnonzero(rows["hash"][1:] == rows["hash"][:-1])
    if len(same):
        twice = rows["hash"][same[0]]
        keys = (key for table in read_parts(folder, count) for key in table["key"].to_pylist())
        key = next(key for key in keys if _hash(key) == twice)
        raise DataError(
            f"{folder} has several scores of {key!r}, so that they cannot be told apart: give each "
            "example a name of its own, and run vlm data score again"
        )
    return rows


def _hash(key: str) -> np.uint64:
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return np.frombuffer(digest, "<u8")[0]


@functools.lru_cache(64)
def _root(source: str) -> str:
    """Return the folder of a source, with its last slash: what comes before names of files."""
    first = os.path.expanduser(source.split("::")[0])
    if os.path.isdir(first):
        return first.rstrip("/") + "/"
    fixed = re.split(r"[*?\[{]", first, maxsplit=1)[0]
    return fixed[: fixed.rfind("/") + 1]
