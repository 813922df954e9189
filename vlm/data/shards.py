"""Shards in lanes: which shard a lane reads when, and its samples in their shuffled order.

Lane l of n reads the shards at places l, l + n, l + 2n, ... of an order of all shards that is drawn
anew for each epoch, each front to back, and then goes on to the next epoch. Its samples are
cut into blocks and each block is shuffled. All of it is a pure function of (seed, lane, shards), so
a position is five numbers and what the shuffle held is read again from the start of its block.
What cannot be read takes one place in that order, as a `BadSample`, and the lane goes on after it.
"""

import zlib
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from vlm.config import DataConfig, FieldFilter
from vlm.data.examples import Example, passes
from vlm.data.faults import BadSample
from vlm.data.randomness import key, permute
from vlm.data.shard_sizes import known_count
from vlm.data.tar import CorruptFileError
from vlm.errors import DataError

_NUMBERS = 24  # bits for the number of an example in its shard

FILTERED = None  # in place of an example that `data.keep` does not pass


class Record(NamedTuple):
    """What a format reads: an example or what is wrong with it, and where the next one begins."""

    example: Example | BadSample
    end: int


@runtime_checkable
class Format(Protocol):
    """How shards of one kind are read front to back."""

    kind: str

    def read(
        self, shard: str, offset: int, number: int, chunk: int
    ) -> Generator[Record, None, None]: ...


class Sample(NamedTuple):
    """One sample of a lane. Its random numbers come from `position`, which no other one has."""

    example: Example | BadSample | Callable[[], Example] | None  # None: `data.keep` left it out
    position: int


class Place(NamedTuple):
    """Where a lane stands between two samples as they lie in the shards."""

    epoch: int = 0
    turn: int = 0  # how many of its shards of this epoch lie behind it
    offset: int = 0  # in the shard, as its format counts
    number: int = 0  # of examples of the shard that lie behind it


@runtime_checkable
class Lane(Protocol):
    """An endless sequence of samples with a position of a few integers."""

    def __next__(self) -> Sample: ...

    def position(self) -> list[Any]: ...

    def close(self) -> None: ...


class Shards:
    """The shards of a stream and how they are read: what all of its lanes have in common."""

    def __init__(
        self,
        names: Sequence[str],
        form: Format,
        config: DataConfig,
        *,
        seed: int,
        lanes: int,
        chunk: int,
        typical: int = 1,
    ):
        if len(names) < lanes:
            raise DataError(
                f"{config.source} has {len(names):,} shards, too few for {lanes} lanes that each "
                "read their own: set data.lanes to at most that, or write more and smaller shards"
            )
        self.names, self.form = names, form
        self.keep: tuple[FieldFilter, ...] = config.keep
        self.seed, self.lanes, self.chunk = seed, lanes, chunk
        self.block = max(1, config.shuffle // lanes)
        self.typical = typical  # examples of a shard of unknown length, as estimated
        self.faults: Sequence[dict[str, Any]] = ()  # met on the way

    @property
    def fingerprint(self) -> str:
        """Equal for the same shards wherever they lie: of their number and their names."""
        names = "\n".join(name.rpartition("/")[2] for name in self.names)
        return f"{len(self.names)}:{zlib.crc32(names.encode()):08x}"

    @property
    def examples(self) -> int:
        """About how many examples an epoch of all lanes has."""
        return self.typical * len(self.names)

    def lane(self, number: int, position: Sequence[int] | None, pool: Executor) -> Lane:
        """Lane `number`, at its beginning or at what its `position()` was."""
        return ShardLane(self, number, position or [0] * 5, pool)

    def shard_of(self, lane: int, epoch: int, turn: int) -> int | None:
        """The shard that a lane reads at a turn of an epoch; None when it has read all of its."""
        place = turn * self.lanes + lane
        if place >= len(self.names):
            return None
        order = key(self.seed, 1)
        return int(permute(order, epoch, np.array([place]), len(self.names))[0])

    def samples(
        self, lane: int, place: Place
    ) -> Generator[tuple[Sample | None, Place], None, None]:
        """The samples of a lane as they lie in its shards, each with the place after it.

        Between two epochs comes None.
        """
        epoch, turn, offset, number = place
        while True:
            shard = self.shard_of(lane, epoch, turn)
            if shard is None:
                epoch, turn, offset, number = epoch + 1, 0, 0, 0
                yield None, Place(epoch)
                continue
            base = (epoch * len(self.names) + shard) << _NUMBERS
            name, after = self.names[shard], Place(epoch, turn + 1)
            empty = number == 0
            try:
                for record in self.form.read(name, offset, number, self.chunk):
                    example = record.example
                    if self.keep and isinstance(example, dict) and not passes(example, self.keep):
                        example = FILTERED
                    sample = Sample(example, base + number)
                    number += 1
                    empty = False
                    yield sample, Place(epoch, turn, record.end, number)
                if empty:  # else a lane of such shards would look for a sample for ever
                    bad = BadSample("empty shard", name, f"the shard {name} holds no examples")
                    yield Sample(bad, base), after
            except (OSError, CorruptFileError) as error:
                lost = (known_count(name) or self.typical) - number
                yield Sample(shard_fault(error, name, lost), base + number), after
            turn, offset, number = turn + 1, 0, 0


class ShardLane:
    """One lane: the next block is read while this one is given out."""

    def __init__(self, shards: Shards, number: int, position: Sequence[int], pool: Executor):
        self._shards, self._number, self._pool = shards, number, pool
        *start, self._behind = position  # of the first block, so many samples are behind us
        self._start = self._next_start = Place(*start)
        self._reading = shards.samples(number, self._start)
        self._block: list[Sample | None] = []
        self._order: list[int] = []
        self._taken = 0
        self._closed = False
        self._ahead: Future = pool.submit(self._read)

    def __next__(self) -> Sample:
        while self._taken == len(self._order):
            self._take_block()
        place = self._order[self._taken]
        sample, self._block[place] = self._block[place], None  # its bytes are not held twice
        self._taken += 1
        assert sample is not None  # each place of the order is taken once
        return sample

    def position(self) -> list[int]:
        """Where the block begins, and how many of it are taken."""
        return [*self._start, self._taken or self._behind]

    def close(self) -> None:
        """Wait for the read that is under way, and read no more."""
        self._closed = True
        if not self._ahead.cancel():
            self._ahead.exception()
        self._reading.close()

    def _read(self) -> tuple[list[Sample], Place]:
        block, place = [], self._next_start
        for sample, after in self._reading:
            if self._closed:
                break
            place = after
            if sample is not None:
                block.append(sample)
            if len(block) == self._shards.block or (sample is None and block):
                break  # full, or the epoch is over: data that is small is not read again and again
        return block, place

    def _take_block(self) -> None:
        self._block, end = self._ahead.result()
        self._start, self._next_start = self._next_start, end
        self._ahead = self._pool.submit(self._read)
        seed = key(self._shards.seed, 2, self._number, *self._start)
        count = len(self._block)
        self._order = permute(seed, 0, np.arange(count), count).tolist()
        self._taken, self._behind = self._behind, 0


def shard_fault(error: Exception, shard: str, lost: int = 1) -> BadSample:
    """What is wrong with a shard that cannot be read, or not to its end: `lost` examples."""
    lost = max(1, lost)
    if isinstance(error, FileNotFoundError):
        return BadSample("missing shard", shard, f"there is no shard {shard}", lost)
    if isinstance(error, CorruptFileError):
        return BadSample("broken shard", shard, f"the shard {shard} is broken: {error}", lost)
    return BadSample("failed read", shard, f"the shard {shard} cannot be read: {error}", lost)
