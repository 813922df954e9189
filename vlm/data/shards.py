"""Lanes over shards: the order of their parts in a lane, and block shuffling of its samples.

A shard is read whole, or in parts of a few examples if its format can start in the middle. The
order is that of all parts, shuffled for each epoch, one epoch after the other. Lane l of n reads
the parts l, l + n, l + 2n, ... of it, each sequentially. Its samples are divided into blocks, and
each block is shuffled. The order is a pure function of (seed, lane, shards), so a position is four
numbers, and a restored lane re-reads its current block. Data that cannot be read is one `BadSample`
in that order, and the lane continues after it.
"""

import json
import os
import zlib
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from vlm.config import DataConfig
from vlm.data.examples import Example, passes
from vlm.data.faults import BadSample
from vlm.data.randomness import key, permute
from vlm.data.scores import scored
from vlm.data.storage import read_file
from vlm.data.tar import CorruptFileError
from vlm.errors import DataError
from vlm.paths import is_remote

SHARD_READERS = 32  # threads that read remote files
SHUFFLE = 8192  # samples in the shuffle buffers, if neither the config nor the format sets it

_INDEX_BITS = 24  # bits for the index of an example in its part

FILTERED = None  # in place of an example that `data.filters` rejects


class Record(NamedTuple):
    """Output of a format: an example or its fault, and the offset of the next one."""

    example: Example | BadSample
    end: int


Records = Generator[Record, None, None]


@runtime_checkable
class Format(Protocol):
    """Sequential reader of one kind of shards."""

    kind: str
    images: bool  # whether examples have their images

    def read(
        self, shard: str, offset: int, number: int, chunk: int, part: int = 0, parts: int = 1
    ) -> Records: ...


class Sample(NamedTuple):
    """One sample of a lane; its unique `position` seeds its random numbers."""

    example: Example | BadSample | Callable[[], Example] | None  # None: rejected by `data.filters`
    position: int


class Place(NamedTuple):
    """Position of a lane in its parts of shards, before the shuffle."""

    turn: int = 0  # number of its parts already read, in all epochs
    offset: int = 0  # in the shard; the unit depends on the format
    number: int = 0  # examples already read from the part


@runtime_checkable
class Lane(Protocol):
    """An endless sequence of samples with a position of a few integers."""

    def __next__(self) -> Sample: ...

    def position(self) -> list[Any]: ...

    def close(self) -> None: ...


class Shards:
    """Shards of a stream with their format and settings, shared by all lanes."""

    def __init__(
        self,
        names: Sequence[str],
        form: Format,
        config: DataConfig,
        *,
        seed: int,
        lanes: int,
        chunk: int,
        shard_length: int = 1,
        parts: int = 1,
        whole: bool = False,
        buffer: int | None = None,
        description: str = "",
        fix_mixing: str | None = None,
    ):
        if len(names) * parts < lanes:
            raise DataError(
                f"{config.source} has {_plural(len(names), parts)}, too few for {lanes} lanes that "
                "each read their own: set data.interleave to at most that, or write more and "
                "smaller shards"
            )
        self.names, self.form, self.parts = names, form, parts
        self.config = config
        self.seed, self.lanes, self.chunk = seed, lanes, chunk
        self.block = max(1, (buffer or config.shuffle or SHUFFLE) // lanes)
        # If a part is read at once, blocks are whole parts, so that none is read twice.
        part_length = -(-shard_length // parts)
        self.together = max(1, self.block // part_length) if whole else None
        if self.together:
            self.block = 2 * self.together * part_length
        self.fix_mixing = fix_mixing
        # Reading local files is work of the cores, and more threads than these slow each other.
        remote = any(map(is_remote, names))
        self.readers = SHARD_READERS if remote else min(SHARD_READERS, os.cpu_count() or 1)
        self.shard_length = shard_length  # estimated examples in a shard of unknown length
        self.examples = shard_length * len(names)
        self.description = f"about {self.examples:,} examples read as a stream{description}"
        self.faults: Sequence[dict[str, Any]] = getattr(form, "faults", ())
        # Number of shards, parts of each, and hash of the shards' names, without their folder.
        short = "\n".join(name.rpartition("/")[2] for name in names)
        self.fingerprint = f"{len(names)}x{parts}:{zlib.crc32(short.encode()):08x}"

    def lane(self, number: int, position: Sequence[int] | None, pool: Executor) -> Lane:
        """Open lane `number`, at its start or at an earlier `position()`."""
        return ShardLane(self, number, position or [0] * 4, pool)

    def part_of(self, lane: int, turn: int) -> tuple[int, int]:
        """Return the epoch and the index of the part that a lane reads at a turn."""
        count = len(self.names) * self.parts
        epoch, place = divmod(turn * self.lanes + lane, count)
        return epoch, int(permute(key(self.seed, 1), epoch, np.array([place]), count)[0])

    def samples(
        self, lane: int, place: Place
    ) -> Generator[tuple[Sample | None, Place], None, None]:
        """Yield the samples of a lane in the order of its parts, each with the place after it.

        Yields None as the sample where a block ends: between two epochs, and after `together`
        parts.
        """
        turn, offset, number = place
        while True:
            epoch, index = self.part_of(lane, turn)
            shard, part = divmod(index, self.parts)
            base = (epoch * len(self.names) * self.parts + index) << _INDEX_BITS
            name, after = self.names[shard], Place(turn + 1)
            empty = number == 0
            try:
                for record in self.form.read(name, offset, number, self.chunk, part, self.parts):
                    example = record.example
                    if isinstance(example, dict):
                        try:
                            passing = passes(scored(example, self.config), self.config.filters)
                            example = example if passing else FILTERED
                        except BadSample as no_score:
                            example = no_score
                    sample = Sample(example, base + number)
                    number += 1
                    empty = False
                    yield sample, Place(turn, record.end, number)
                if empty and part == 0:  # else a lane with only such shards would never return
                    bad = BadSample("empty shard", name, f"the shard {name} holds no examples")
                    yield Sample(bad, base), after
            except (OSError, CorruptFileError) as error:
                length = known_count(name) or self.shard_length
                lost = -(-length * (part + 1) // self.parts) + (-length * part // self.parts)
                yield Sample(shard_fault(error, name, lost - number), base + number), after
            turn, offset, number = turn + 1, 0, 0
            complete = self.together and turn % self.together == 0
            if complete or self.part_of(lane, turn)[0] != epoch:
                yield None, Place(turn)


class ShardLane:
    """A lane with block shuffling; it reads the next block once half of one is taken."""

    def __init__(self, shards: Shards, number: int, position: Sequence[int], pool: Executor):
        self._shards, self._number, self._pool = shards, number, pool
        *start, self._skipped = position  # the second: samples of the first block already taken
        self._start = self._next_start = Place(*start)
        self._reading = shards.samples(number, self._start)
        self._block: list[Sample | None] = []
        self._order: list[int] = []
        self._taken = 0
        self._closed = False
        self._ahead: Future | None = pool.submit(self._read)

    def __next__(self) -> Sample:
        while self._taken == len(self._order):
            self._take_block()
        place = self._order[self._taken]
        sample, self._block[place] = self._block[place], None  # frees its memory
        self._taken += 1
        if self._ahead is None and 2 * self._taken >= len(self._order):
            self._ahead = self._pool.submit(self._read)
        assert sample is not None  # each place is taken once
        return sample

    def position(self) -> list[int]:
        """Return the start of the block and the number of its samples already taken."""
        return [*self._start, self._taken or self._skipped]

    def close(self) -> None:
        """Wait for the current read, and stop."""
        self._closed = True
        if self._ahead is not None and not self._ahead.cancel():
            self._ahead.exception()
        self._reading.close()

    def _read(self) -> tuple[list[Sample | None], Place]:
        block: list[Sample | None] = []
        place = self._next_start
        for sample, after in self._reading:
            if self._closed:
                break
            place = after
            if sample is not None:
                block.append(sample)
            if len(block) == self._shards.block or (sample is None and block):
                break  # full, or the end of the epoch or of a part
        return block, place

    def _take_block(self) -> None:
        ahead = self._ahead or self._pool.submit(self._read)
        self._block, end = ahead.result()
        self._start, self._next_start = self._next_start, end
        self._ahead = None
        seed = key(self._shards.seed, 2, self._number, *self._start)
        count = len(self._block)
        self._order = permute(seed, 0, np.arange(count), count).tolist()
        self._taken, self._skipped = self._skipped, 0


def _plural(shards: int, parts: int) -> str:
    return f"{shards:,} shards" + (f" of {parts:,} parts" if parts > 1 else "")


def shard_fault(error: Exception, shard: str, lost: int = 1) -> BadSample:
    """Build the fault of a shard that cannot be read (to its end) and loses `lost` examples."""
    lost = max(1, lost)
    if isinstance(error, FileNotFoundError):
        return BadSample("missing shard", shard, f"there is no shard {shard}", lost)
    if isinstance(error, CorruptFileError):
        return BadSample("broken shard", shard, f"the shard {shard} is broken: {error}", lost)
    return BadSample.failed_read(shard, f"the shard {shard} cannot be read: {error}", error, lost)


def known_count(shard: str) -> int | None:
    """Look up the number of examples in a shard, in files beside it; None if no file has it.

    - `00000_stats.json` of img2dataset, beside `00000.tar`: its `successes`.
    - `sizes.json`, a convention of open_clip users: shard names to numbers of examples.
    - `manifest.jsonl` of `vlm data prepare`.

    Else the length of a shard that cannot be read is estimated: in a stream from the size of one
    shard and of its first examples, under random access as the mean of the intact shards.
    """
    folder, slash, name = shard.rpartition("/")
    places: dict[str, Callable[[dict[str, Any]], Any]] = {
        f"{name.partition('.')[0]}_stats.json": lambda row: row.get("successes"),
        "sizes.json": lambda row: row.get(name),
        "manifest.jsonl": lambda row: row.get("examples") if row.get("file") == name else None,
    }
    counts = (  # a file is read only if those before it have no count
        count(row)
        for file, count in places.items()
        for row in _json_objects(f"{folder}{slash}{file}")
    )
    return next((n for n in counts if isinstance(n, int) and n >= 0), None)


def _json_objects(path: str) -> list[dict[str, Any]]:
    """Read the JSON objects of a file, or of each of its lines; none if it cannot be read."""
    try:
        text = read_file(path).decode()
        lines = text.splitlines() if path.endswith(".jsonl") else [text]
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return []
    return [row for row in rows if isinstance(row, dict)]
