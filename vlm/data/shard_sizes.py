"""Number of examples in a shard according to files beside it, for shards that cannot be read.

- `00000_stats.json` of img2dataset, beside `00000.tar`: its `successes`.
- `sizes.json`, a convention of open_clip users: shard names to numbers of examples.
- `manifest.jsonl` of `vlm data prepare`.

Without such a file the length is estimated: in a stream from the size of one shard and of its first
examples, under random access as the mean of the intact shards.
"""

import json
from typing import Any

from vlm.data.storage import read_file


def known_count(shard: str) -> int | None:
    """Look up the number of examples in a shard; None if no file has it."""
    folder, slash, name = shard.rpartition("/")
    stats = _read(f"{folder}{slash}{name.partition('.')[0]}_stats.json")
    sizes, manifest = _read(f"{folder}{slash}sizes.json"), _read(f"{folder}{slash}manifest.jsonl")
    found = [stats[0].get("successes")] if stats else []
    found += [sizes[0].get(name)] if sizes else []
    found += [line.get("examples") for line in manifest if line.get("file") == name]
    return next((count for count in found if isinstance(count, int) and count >= 0), None)


def _read(path: str) -> list[dict[str, Any]]:
    """Read the JSON objects of a file, or of each of its lines; none if it cannot be read."""
    try:
        text = read_file(path).decode()
        lines = text.splitlines() if path.endswith(".jsonl") else [text]
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return []
    return [row for row in rows if isinstance(row, dict)]
