"""How many examples a shard holds, as files beside it state: for shards that cannot be read.

- `00000_stats.json` of img2dataset, beside `00000.tar`: its `successes`.
- `sizes.json`, as open_clip's users write it: names of shards to numbers of examples.
- `manifest.jsonl` of `vlm data prepare`.

Where there is none, the length is estimated: in a stream from the size of one shard and of its
first examples, under random access as the mean of the shards that are whole.
"""

import json
from typing import Any

from vlm.data.storage import read_file


def known_count(shard: str) -> int | None:
    """The number of examples that a shard should hold; None where no file says so."""
    folder, slash, name = shard.rpartition("/")
    stats = _read(f"{folder}{slash}{name.partition('.')[0]}_stats.json")
    sizes, manifest = _read(f"{folder}{slash}sizes.json"), _read(f"{folder}{slash}manifest.jsonl")
    found = [stats[0].get("successes")] if stats else []
    found += [sizes[0].get(name)] if sizes else []
    found += [line.get("examples") for line in manifest if line.get("file") == name]
    return next((count for count in found if isinstance(count, int) and count >= 0), None)


def _read(path: str) -> list[dict[str, Any]]:
    """The JSON objects of a file, or of each of its lines; none where it cannot be read."""
    try:
        text = read_file(path).decode()
        lines = text.splitlines() if path.endswith(".jsonl") else [text]
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return []
    return [row for row in rows if isinstance(row, dict)]
