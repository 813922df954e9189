"""Shards as a stream: found by name, looked at before the first step, and opened in lanes."""

from typing import Any

from vlm.config import DataConfig
from vlm.data.examples import check_features, wanted_features
from vlm.data.faults import BadSample
from vlm.data.shards import Format, Shards
from vlm.data.sidecar import sidecar_path
from vlm.data.splits import split_files
from vlm.data.storage import CHUNK, exists
from vlm.data.tar import Torn
from vlm.data.webdataset import TarFormat
from vlm.errors import DataError

_BUFFERS = 512 << 20  # bytes that the reads of one process may hold
_LOOKED_AT = 8  # shards, before a source counts as unreadable
_EXAMPLES = 64  # of a shard


def find_shards(config: DataConfig) -> list[str]:
    """The shards of the training split, in order.

    Raises:
        DataError: there are none.
    """
    return split_files(config.source, config.train_split, config.train_split)


def open_shards_as_stream(
    config: DataConfig, names: list[str], lanes: int, seed: int, process_count: int
) -> Shards:
    """The shards in lanes.

    Raises:
        DataError: too few of them, none that can be read, or none that holds what is named.
    """
    form = format_of(config, names)
    chunk = max(256 << 10, min(CHUNK, _BUFFERS // (lanes // process_count)))
    return Shards(names, form, config, seed=seed, lanes=lanes, chunk=chunk)


def format_of(config: DataConfig, names: list[str]) -> Format:
    """How to read the shards, after a look at the first examples of one that can be read.

    Raises:
        DataError: as above.
    """
    last: Exception | str = "no shard"
    for name in names[:_LOOKED_AT]:
        form: Format
        if ".parquet" in name:
            from vlm.data.parquet import ParquetFormat

            form = ParquetFormat(config)
        else:
            form = TarFormat(config)
        try:
            examples, bad = _first(form, name)
        except (OSError, Torn) as error:
            last = f"there is no {name}" if isinstance(error, FileNotFoundError) else error
            continue
        if not examples:
            last = bad[0] if bad else f"{name} holds no examples"
            continue
        known: dict[str, Any] = {k: v for example in examples for k, v in example.items()}
        known = {feature: value for feature, value in known.items() if not feature.startswith("\0")}
        missing = [feature for feature in wanted_features(config) if feature not in known]
        if missing and form.kind == "tar" and exists(sidecar_path(name)):
            return TarFormat(config, sidecar=True)  # its reader names what the table lacks
        check_features(config, known, f"the shard {name}")
        return form
    raise DataError(
        f"none of the first {min(_LOOKED_AT, len(names))} shards of {config.source} can be used "
        f"({last}): check data.source"
    )


def _first(form: Format, name: str) -> tuple[list[dict[str, Any]], list[BadSample]]:
    examples, bad = [], []
    reader = form.read(name, 0, 0, 1 << 20)
    try:
        for record in reader:
            (bad if isinstance(record.example, BadSample) else examples).append(record.example)
            if len(examples) + len(bad) == _EXAMPLES:
                break
    except (OSError, Torn):
        if not examples:
            raise
    finally:
        reader.close()
    return examples, bad
