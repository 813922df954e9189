"""Opening of shards as a stream: file names, inspection of the first shards, and lanes."""

from vlm.config import DataConfig
from vlm.data.examples import LOOKED_AT, check_features, features_of, wanted_features
from vlm.data.parquet import ParquetFormat, count_rows
from vlm.data.shards import Format, Record, Shards, known_count
from vlm.data.sidecar import sidecar_path
from vlm.data.splits import split_files
from vlm.data.storage import CHUNK, exists, size_of
from vlm.data.tar import CorruptFileError
from vlm.data.webdataset import TarFormat
from vlm.errors import DataError

_BUFFERS = 512 << 20  # bytes of read buffers per process
_LOOKED_AT = 8  # shards to try, before a source counts as unreadable


def find_shards(config: DataConfig) -> list[str]:
    """List the shards of the training split, in order."""
    return split_files(config.source, config.train_split, config.train_split)


def open_shards_as_stream(
    config: DataConfig, names: list[str], lanes: int, seed: int, process_count: int
) -> Shards:
    """Open shards for reading in lanes; DataError if none can be used, or they are too few."""
    form, length = inspect_shards(config, names)
    chunk = max(256 << 10, min(CHUNK, _BUFFERS // (lanes // process_count)))
    return Shards(names, form, config, seed=seed, lanes=lanes, chunk=chunk, shard_length=length)


def inspect_shards(config: DataConfig, names: list[str]) -> tuple[Format, int]:
    """Inspect the first readable shard; return the format and the estimated examples per shard.

    DataError if none can be read, or they lack wanted features.
    """
    last = "no shard"
    for name in names[:_LOOKED_AT]:
        form: Format = (ParquetFormat if ".parquet" in name else TarFormat)(config)
        try:
            first, is_all = _first(form, name)
            length = known_count(name) or (len(first) if is_all else _length(form, name, first))
        except (OSError, CorruptFileError) as error:
            missing = isinstance(error, FileNotFoundError)
            last = f"there is no {name}" if missing else f"{name} cannot be read: {error}"
            continue
        if not first:
            last = f"{name} holds no examples"
            continue
        known = features_of([record.example for record in first], f"the shard {name}")
        absent = [feature for feature in wanted_features(config) if feature not in known]
        if absent and form.kind == "tar" and exists(sidecar_path(name)):
            return TarFormat(config, sidecar=True), length  # raises if the table lacks a feature
        check_features(config, known, f"the shard {name}")
        return form, length
    raise DataError(
        f"none of the first {min(_LOOKED_AT, len(names))} shards of {config.source} can be used "
        f"({last}): check data.source"
    )


def _first(form: Format, name: str) -> tuple[list[Record], bool]:
    """Read the first examples of a shard; also return whether these are all."""
    records: list[Record] = []
    reader = form.read(name, 0, 0, 1 << 20)
    try:
        for record in reader:
            records.append(record)
            if len(records) == LOOKED_AT:
                return records, False
    except (OSError, CorruptFileError):
        if not records:
            raise
    finally:
        reader.close()
    return records, True


def _length(form: Format, name: str, first: list[Record]) -> int:
    """Estimate the examples in a shard from its size and that of its first examples."""
    if form.kind == "tar":
        return max(len(first), round(size_of(name) / first[-1].end * len(first)))
    return max(len(first), count_rows(name))
