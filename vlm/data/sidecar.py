"""Sidecar `.parquet` tables that img2dataset writes beside tar shards, by the key of examples.

A stream reads the table of its current shard. Random access needs the rows of all shards at any
time, so they are stored in one SQLite database in the cache folder when first opened. All processes
and workers of a machine share its pages.
"""

import contextlib
import json
import os
import sqlite3
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vlm.config import DataConfig
from vlm.data.examples import wanted_features
from vlm.data.parquet import read_columns
from vlm.data.storage import READERS, cache_path

_TABLES = """
    CREATE TABLE row (shard INTEGER, key TEXT, fields TEXT, PRIMARY KEY (shard, key)) WITHOUT ROWID;
    CREATE TABLE fault (shard INTEGER PRIMARY KEY, why TEXT);
"""


def sidecar_path(shard: str) -> str:
    """Return the path of the sidecar table of a shard."""
    return shard.removesuffix(".tar") + ".parquet"


def read_sidecar(shard: str, config: DataConfig) -> dict[str, dict[str, Any]]:
    """Read the wanted features in the table beside a shard, by key."""
    rows = read_columns(sidecar_path(shard), ["key", *wanted_features(config)])
    return {str(row.pop("key")): row for row in rows}


class Sidecars:
    """Sidecar rows of several shards, by index of the shard and key."""

    def __init__(self, shards: Sequence[str], config: DataConfig):
        self._path = _database(shards, config)
        self._open()

    def row(self, shard: int, key: str) -> dict[str, Any]:
        """Return the wanted features of an example, if the table has it; OSError if corrupt."""
        if shard in self._faults:
            raise OSError(self._faults[shard])
        query = "SELECT fields FROM row WHERE shard = ? AND key = ?"
        result = self._connection().execute(query, (shard, key)).fetchone()
        return json.loads(result[0]) if result else {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._open()

    def _open(self) -> None:
        self._own = threading.local()
        self._faults = dict(self._connection().execute("SELECT shard, why FROM fault"))

    def _connection(self) -> sqlite3.Connection:
        """Return the connection of this thread and process (SQLite's must not survive a fork)."""
        if getattr(self._own, "pid", None) != os.getpid():
            uri = f"file:{self._path}?mode=ro&immutable=1"
            self._own.rows, self._own.pid = sqlite3.connect(uri, uri=True), os.getpid()
        return self._own.rows


def _database(shards: Sequence[str], config: DataConfig) -> str:
    """Return the database file with the rows of all tables; write it if it is missing."""
    path = cache_path([*map(sidecar_path, shards)], ".rows", *wanted_features(config))
    if os.path.exists(path):
        return path
    with (
        tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder,
        ThreadPoolExecutor(READERS) as pool,
    ):
        unfinished = os.path.join(folder, "rows")
        with contextlib.closing(sqlite3.connect(unfinished)) as rows:
            rows.executescript(_TABLES)
            for number, table in enumerate(pool.map(lambda shard: _read(shard, config), shards)):
                if isinstance(table, OSError):
                    rows.execute("INSERT INTO fault VALUES (?, ?)", (number, str(table)))
                    continue
                fields = ((number, key, json.dumps(row, default=str)) for key, row in table.items())
                rows.executemany("INSERT INTO row VALUES (?, ?, ?)", fields)
            rows.commit()
        os.replace(unfinished, path)
    return path


def _read(shard: str, config: DataConfig) -> dict[str, dict[str, Any]] | OSError:
    try:
        return read_sidecar(shard, config)
    except OSError as error:
        return error
