"""Sequential reader of a whole data set, for statistics and for `vlm data prepare`."""

import itertools
import sys
from collections.abc import Iterator
from typing import NamedTuple

from vlm.config import DataConfig
from vlm.data.examples import Example
from vlm.data.faults import BadSample
from vlm.data.python_stream import read_iterable
from vlm.data.shard_stream import find_shards, inspect_shards
from vlm.data.shards import known_count, shard_fault
from vlm.data.sources import has_shards, is_iterable, open_source
from vlm.data.storage import CHUNK
from vlm.data.tar import CorruptFileError


class Read(NamedTuple):
    """An example or its fault, and the place of the next one."""

    example: Example | BadSample
    after: list[int]


class ExampleReader:
    """Sequential reader of a split, from any place."""

    def __init__(self, config: DataConfig, split: str):
        self._config, self._split = config, split
        self._source, self._shards = None, []  # an iterable has neither
        self.count: int | None = None  # of examples; None if unknown before reading
        self.faults: list[BadSample] = []  # of shards, known before reading
        if is_iterable(config, split):
            self.description = "the elements of an iterable, in its order"
        elif has_shards(config) and split == config.train_split:
            self._shards = find_shards(config)
            self._format, self._shard_length, _ = inspect_shards(config, self._shards)
            self.description = f"{len(self._shards):,} shards, read as a stream"
        else:
            self._source = open_source(config, split)
            self.count = len(self._source)
            self.faults = [BadSample(**r) for r in getattr(self._source, "faults", ())]
            self.description = f"{self.count:,} examples"

    def ranges(self, examples: int) -> Iterator[tuple[list[int], int]]:
        """Yield arguments of `read` for parts of the split: `examples` examples or one shard."""
        if self._source is not None:
            for first in range(0, len(self._source), examples):
                yield [first], first + examples
        elif not self._shards:
            yield [0], sys.maxsize
        for shard in range(len(self._shards)):
            yield [shard, 0, 0], shard + 1

    def read(self, place: list[int] | None = None, end: int | None = None) -> Iterator[Read]:
        """Yield the examples from `place` (default: the first) up to the example or shard `end`."""
        if self._source is None and not self._shards:
            (first,) = place or [0]
            examples = read_iterable(self._config, self._split)
            for index, example in itertools.islice(enumerate(examples), first, end):
                yield Read(example, [index + 1])
            return
        if self._source is not None:
            (first,), last = place or [0], len(self._source)
            if first == 0:
                yield from (Read(fault, [0]) for fault in self.faults)
            for index in range(first, last if end is None else min(end, last)):
                try:
                    example: Example | BadSample = self._source[index]
                except BadSample as fault:
                    example = fault
                yield Read(example, [index + 1])
            return
        shard, offset, number = place or [0, 0, 0]
        for now in range(shard, len(self._shards) if end is None else end):
            name = self._shards[now]
            try:
                for record in self._format.read(name, offset, number, CHUNK):
                    number += 1
                    yield Read(record.example, [now, record.end, number])
            except (OSError, CorruptFileError) as error:
                lost = (known_count(name) or self._shard_length) - number
                yield Read(shard_fault(error, name, lost), [now + 1, 0, 0])
            offset = number = 0
