"""Opening of shards as a stream: inspection of the first shards, and the plan of their reading.

A batch has the variety of random order if each of its rows comes from another place of the data.
So there are as many lanes as a batch has rows, if the shards have as many parts and the buffers
fit in `MEMORY`. A lane holds one part in its buffer, so parts are small: slices of a row group, or
a few examples of an indexed tar. The plan depends on the data, the config and the global batch
alone, so that the order is the same for any number of processes.
"""

import dataclasses

from vlm.config import DataConfig
from vlm.data.examples import LOOKED_AT, check_features, features_of, wanted_features
from vlm.data.interleave import MAX_DEFAULT_LANES
from vlm.data.parquet import ParquetFormat, check_columns, layout_of
from vlm.data.parquet_file import check_footer
from vlm.data.shard_index import ShardParts, beside
from vlm.data.shards import SHUFFLE, Format, Record, Shards, known_count
from vlm.data.sidecar import sidecar_path
from vlm.data.splits import split_files
from vlm.data.storage import CHUNK, exists, size_of
from vlm.data.tar import CorruptFileError
from vlm.data.webdataset import TarFormat
from vlm.errors import DataError
from vlm.paths import is_remote

MEMORY = 4 << 30  # bytes of samples in the buffers of all processes, if `shuffle` is not set

_MAX_LANES = 4096  # of shards in parts
_PART = 16  # examples of a part, unless the buffers need smaller or larger ones
_LEAST = 4  # examples of a part
# A local row group is decoded as often as costs 8% of the CPU time that its images take: four times
# for photos, more often for tiny images, whose time is mostly that of their transforms.
_VISITS, _VISITED_BYTES = 4, 20_000
_BUFFERS = 512 << 20  # bytes of read buffers per process
_LOOKED_AT = 8  # shards to try, before a source counts as unreadable


def find_shards(config: DataConfig) -> list[str]:
    """List the shards of the training split, in order."""
    return split_files(config.source, config.train_split, config.train_split)


@dataclasses.dataclass(frozen=True)
class StreamPlan:
    """Shards of a stream, and how they are read.

    Attributes:
        length: estimated examples of a shard.
        parts: parts of each shard.
        whole: read each part at once, into a buffer. Else buffers of any length are filled from a
            shard that stays open.
        most: largest useful number of lanes.
        row_bytes: estimated bytes of an example; None if unknown.
        wanted: lanes that a batch needs for the mixing of random order.
    """

    config: DataConfig
    names: list[str]
    form: Format
    length: int
    parts: int = 1
    whole: bool = False
    most: int = MAX_DEFAULT_LANES
    row_bytes: float | None = None
    wanted: int = MAX_DEFAULT_LANES

    @property
    def units(self) -> int:
        """Number of parts of all shards."""
        return len(self.names) * self.parts

    def buffer(self, lanes: int) -> int:
        """Return the samples in the shuffle buffers of all lanes."""
        needed = lanes * -(-self.length // self.parts) if self.whole else 0
        return self.config.shuffle or max(SHUFFLE, needed)

    def open(self, lanes: int, seed: int, process_count: int) -> Shards:
        """Open the shards for reading in lanes; DataError if they are too few."""
        chunk = max(256 << 10, min(CHUNK, _BUFFERS // max(1, lanes // process_count)))
        return Shards(
            self.names,
            self.form,
            self.config,
            seed=seed,
            lanes=lanes,
            chunk=chunk,
            shard_length=self.length,
            parts=self.parts,
            whole=self.whole,
            buffer=self.buffer(lanes),
            description=self._about(lanes),
            fix_mixing=self._fix_mixing(lanes),
        )

    def _about(self, lanes: int) -> str:
        samples = self.buffer(lanes)
        size = f", about {_gib(samples * self.row_bytes)} in all" if self.row_bytes else ""
        return f" by {lanes:,} readers (buffers: {samples:,} samples{size})"

    def _fix_mixing(self, lanes: int) -> str:
        """Return how to have more distinct classes in a batch."""
        if self.config.interleave and min(self.units, self.wanted) > self.config.interleave:
            return "leave data.interleave unset"
        if isinstance(self.form, TarFormat) and not (self.whole or self.form.sidecar):
            return f"run vlm data index '{self.config.source}', which lets readers start anywhere"
        if self.row_bytes and min(self.units, self.wanted) > self.most:
            samples = min(self.units, self.wanted) * -(-self.length // self.parts)
            size = _gib(samples * self.row_bytes)
            return f"set data.shuffle to {samples:,} samples (about {size} in all processes)"
        return "write the data in random order, or for random access with vlm data prepare"


def plan_stream(config: DataConfig, names: list[str], global_batch: int) -> StreamPlan:
    """Plan the reading of shards as a stream, after inspecting the first readable one.

    DataError if none can be read, or they lack wanted features.
    """
    form, length, name = inspect_shards(config, names)
    best = min(global_batch, _MAX_LANES)
    plan = StreamPlan(config, names, form, length, wanted=best)
    wanted = config.interleave or best
    small = length * len(names) <= (config.shuffle or SHUFFLE)  # the buffers hold all examples
    if isinstance(form, ParquetFormat):
        rows, groups, size = layout_of(name, config)
        row_bytes = max(1.0, size / max(1, rows))
        if small or not rows:
            return dataclasses.replace(plan, row_bytes=row_bytes)
        limit = config.shuffle or max(1, int(MEMORY / row_bytes))
        units, visits = -(-wanted // len(names)), 1
        if groups * _PART < rows:  # row groups are large
            by_memory = -(-rows * wanted // (groups * max(limit, wanted)))
            visits = max(by_memory, -(-units // groups))
            local = _VISITS + int(_VISITED_BYTES / row_bytes)
            visits = max(1, min(visits, 1 if is_remote(name) else local, rows // groups // _LEAST))
            form.visits = visits
            parts = groups * visits
        else:
            parts = max(1, min(groups, max(units, rows // _PART)))
        return _limited(plan, parts, rows, limit, wanted, row_bytes)
    if small or not isinstance(form, TarFormat) or form.sidecar or not exists(beside(names)):
        return plan
    row_bytes = max(1.0, size_of(name) / length)
    limit = config.shuffle or max(1, int(MEMORY / row_bytes))
    part = min(_PART, max(_LEAST, limit // wanted))
    plan = dataclasses.replace(plan, form=TarFormat(config, index=ShardParts(names)))
    return _limited(plan, max(1, length // part), length, limit, wanted, row_bytes)


def _limited(
    plan: StreamPlan, parts: int, rows: int, limit: int, wanted: int, row_bytes: float
) -> StreamPlan:
    """Return the plan with its parts, and no more lanes than fit in `limit` samples."""
    most = max(1, min(wanted, limit // max(1, -(-rows // parts))))
    return dataclasses.replace(plan, parts=parts, whole=True, most=most, row_bytes=row_bytes)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


def inspect_shards(config: DataConfig, names: list[str]) -> tuple[Format, int, str]:
    """Inspect the first readable shard; return the format, estimated examples per shard, its name.

    DataError if none can be read, or they lack wanted features.
    """
    last, cause = "no shard", None
    for name in names[:_LOOKED_AT]:
        form: Format = (ParquetFormat if ".parquet" in name else TarFormat)(config)
        try:
            check_footer(name)
            first, is_all = _first(form, name)
            length = known_count(name) or (
                len(first) if is_all else _length(form, name, first, config)
            )
        except (OSError, CorruptFileError) as error:
            missing = isinstance(error, FileNotFoundError)
            last = f"there is no {name}" if missing else f"{name} cannot be read: {error}"
            cause = error
            continue
        if not first:
            last = f"{name} holds no examples"
            continue
        if form.kind == "parquet":
            check_columns(name, config)
        known = features_of([record.example for record in first], f"the shard {name}")
        absent = [feature for feature in wanted_features(config) if feature not in known]
        if absent and form.kind == "tar" and exists(sidecar_path(name)):
            # Raises if the table lacks a feature.
            return TarFormat(config, sidecar=True), length, name
        check_features(config, known, f"the shard {name}")
        return form, length, name
    raise DataError(
        f"none of the first {min(_LOOKED_AT, len(names))} shards of {config.source} can be used "
        f"({last}): check data.source"
    ) from cause


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


def _length(form: Format, name: str, first: list[Record], config: DataConfig) -> int:
    """Estimate the examples in a shard from its size and that of its first examples."""
    if form.kind == "tar":
        return max(len(first), round(size_of(name) / first[-1].end * len(first)))
    return max(len(first), layout_of(name, config).rows)
