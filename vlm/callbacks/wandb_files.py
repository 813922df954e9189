"""Reader of the files of offline W&B runs."""

import json
import struct
from collections.abc import Iterator
from typing import Any

from etils import epath

HEADER, BLOCK = 7, 32768  # bytes: of a file and of a part of a record, and of a block
_FULL, _LAST = 1, 4  # kinds of parts


def offline_rows(folder: epath.Path, id: str) -> list[dict[str, Any]]:
    """Read the rows that W&B's run `id` logged offline, from the files below `folder`."""
    if not folder.exists():
        return []
    files = sorted(folder.glob(f"offline-run-*-{id}/*.wandb"))
    found = [record for file in files for record in records(file)]
    return [values(r.history.item) for r in found if r.HasField("history")]


def records(file: epath.Path) -> Iterator[Any]:
    """Yield the records of a `.wandb` file, up to where it is truncated.

    The format is that of LevelDB's log: records are split into parts, which do not cross blocks.
    """
    # A module of protobuf makes its classes when it is imported.
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    data, at, parts = file.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if (left := BLOCK - at % BLOCK) < HEADER:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        at += HEADER + length
        if at > len(data):
            return
        parts += data[at - length : at]
        if kind in (_FULL, _LAST):
            yield Record.FromString(parts)
            parts = b""


def values(items: Any) -> dict[str, Any]:
    """Return the names and values of W&B's items."""
    return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
