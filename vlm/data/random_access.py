"""Batches from a random-access source: each batch is a pure function of its step.

Sample g of a run (counted over all processes and epochs) is example `shuffle(g mod n)` of epoch
g // n (`weighted_order` has the same for weighted examples); g also seeds its crop, colours and
caption. A global batch contains the next samples, as many as its `BatchSchedule` says, and each
process makes its own slice. So a run resumes exactly from a number of samples, on any number of
processes or workers and with another batch size, and within an epoch no sample is lost or repeated.
A bad sample is replaced by another example, also drawn from g; all other samples are unaffected.
"""

import functools
import json
import os
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import grain
import numpy as np

from vlm.config import DataConfig
from vlm.config.batch_sizes import BatchSize
from vlm.data.batch_schedule import BatchSchedule
from vlm.data.examples import Source
from vlm.data.faults import BadSample, TooManyBad
from vlm.data.randomness import key, uniforms
from vlm.data.reinforced import Reinforced
from vlm.data.shards import Sample
from vlm.data.transform_example import ExampleTransform, transforms_by_length
from vlm.data.weighted_order import Order
from vlm.errors import DataError
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import AnyTokenizer
from vlm.nn.naflex import Patches

Batch = dict[str, Any]

_FOREVER = 2**40  # steps; grain requires a length


class TrainBatches:
    """Training batches of one process by step: `batches[step]`; the position is the step.

    Besides `images` and `tokens` a batch has `texts_cut`, which texts were truncated, and `bad`,
    the replaced samples as JSON.
    """

    parts = 1  # elements per batch

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        preprocess: Preprocess,
        tokenizer: AnyTokenizer,
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        epochs: float | None = None,
        reinforced: Reinforced | None = None,
        order: Order | None = None,
        schedule: BatchSchedule | None = None,
    ):
        self._order = order or Order(len(source))
        self._source, self._tokenizer, self._reinforced = source, tokenizer, reinforced
        sizes = schedule or BatchSchedule([BatchSize(batch_size * process_count)], seed)
        self._schedule, self._seed = sizes, seed
        self._transforms = transforms_by_length([config], preprocess, sizes)
        self._process, self._processes = process_index, process_count
        self._max_bad_in_a_row = config.max_bad_in_a_row
        largest = max(sizes.sizes).pairs
        if largest > len(source):
            raise DataError(
                f"the global batch of {largest} is larger than the {len(source)} "
                f"examples of {config.source} {config.train_split}: choose a smaller batch_size"
            )
        if reinforced is not None:
            reinforced.check(config, len(source))
        self.length = _FOREVER
        if epochs is not None:
            self.length = sizes.steps_of(int(epochs * len(source)))
        self.workers, self._prefetch = config.workers, config.prefetch
        # Decoding releases the GIL.
        self._threads = 1 if config.cache else min(config.prefetch, os.cpu_count() or 1)
        self._step = 0  # of the next batch to be read
        self._first = (0, 0)  # a step, and the position of its first sample

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, step: int) -> Batch:
        step, size = int(step), self._schedule.at(int(step))
        count, transform = size.pairs // self._processes, self._transforms[size.patches]
        first = self._position(step) + count * self._process
        positions = np.arange(first, first + count)
        indices = self._order.places(self._seed, positions)
        store, variants = self._reinforced, np.zeros_like(positions)
        if store is None:
            draws = transform.draws(self._seed, positions)
        else:
            variants = store.choose(self._seed, positions)
            draws = store.draws(transform, indices, variants)
        images = transform.blank(count)
        bad: list[dict[str, str]] = []
        numbers = zip(indices.tolist(), variants.tolist(), positions.tolist(), strict=True)
        rows = [
            self._make(transform, *number, u, images, row, bad)
            for row, (u, number) in enumerate(zip(draws, numbers, strict=True))
        ]
        texts, indices = [text for text, _ in rows], np.array([index for _, index in rows])
        teacher = {} if store is None else store.embeddings(indices, variants)
        tokens, cut = self._tokenizer.rows(texts)
        batch = {"images": images, "tokens": tokens, "texts_cut": cut, "bad": json.dumps(bad)}
        return batch | teacher

    @property
    def element_bytes(self) -> int:
        """Bytes of the largest batch of this process."""
        length = self._tokenizer.config.context_length
        other = 4 * length + (0 if self._reinforced is None else 2 * 4 * self._reinforced.width)
        return max(
            pairs // self._processes * (self._transforms[patches].image_bytes + other)
            for pairs, patches in self._schedule.sizes
        )

    def read(self) -> grain.IterDataset:
        """Return the batches from the current position."""
        batches: Any = self  # a sequence without the base class
        data = grain.MapDataset.source(batches).slice(slice(self._step, None))
        threads = self._threads if self._prefetch else 0
        ahead = (1, 1) if self.workers else (threads, self._prefetch)
        return data.to_iter_dataset(grain.ReadOptions(*ahead))

    def join(self, elements: list[Batch]) -> Batch:
        """Return the only element; advance the position."""
        self._step += 1
        return elements[0]

    def state(self, step: int) -> dict[str, Any]:
        """Return the step, the position, and the number of examples to recognise the data."""
        state = {"step": step, "examples": len(self._source), "position": self._position(step)}
        return state | ({"weights": self._order.digest} if self._order.digest else {})

    def start_at(self, step: int, position: int = 0) -> None:
        """Let the first sample of the batch `step` be the one at `position`."""
        self._step, self._first = step, (step, position)

    def _position(self, step: int) -> int:
        """Return the position of the first sample of a batch of all processes."""
        first_step, first = self._first
        before = self._schedule.pairs_before
        return first + before(step) - before(first_step)

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the position of `state`; DataError if it belongs to other data."""
        if "lanes" in state:
            raise DataError(
                "the checkpoint is for a stream, and the data has random access: set "
                'data.access="stream"'
            )
        here = len(self._source)
        examples = state.get("examples", here)  # missing in older checkpoints
        if examples != here:
            raise DataError(
                f"the checkpoint is for other data ({examples:,} examples, here {here:,}): resume "
                "with the data that the run started with, or start a new pass over this data with "
                "another --seed"
            )
        if state.get("weights", "") != self._order.digest:
            raise DataError(
                "the checkpoint is for other weights of the examples than those in "
                "data.weight_column now: restore the column, or start a new pass with another "
                "--seed"
            )
        step = state["step"]  # older checkpoints have no position
        self.start_at(step, state.get("position", self._schedule.pairs_before(step)))

    def _make(
        self,
        transform: ExampleTransform,
        index: int,
        variant: int,
        position: int,
        u: np.ndarray,
        images: np.ndarray | Patches,
        row: int,
        bad: list,
    ) -> tuple[str, int]:
        """Write an example (or a replacement) to `row`; return its text and index."""
        last: BadSample | None = None
        for attempt in range(self._max_bad_in_a_row):
            try:
                example = self._source[index]
                return transform(example, u, images, row, f"example {index}"), index
            except BadSample as fault:
                bad.append(fault.record())
                last = fault
                other = uniforms(key(self._seed, 3, attempt), np.array([position]), 1)[0, 0]
                index = self._order.draw(other)
                if self._reinforced is not None:  # augmentation depends on the example
                    at = np.array([index]), np.array([variant])
                    u = self._reinforced.draws(transform, *at)[0]
        assert last is not None  # there was at least one attempt
        raise TooManyBad.in_a_row(self._max_bad_in_a_row, last)


class IndexedStream:
    """Stream over a random-access source: lane l of n takes positions l, l + n, l + 2n, ...

    Without `shuffle` a position is the index of its example, also beyond the length of the source.
    """

    def __init__(
        self,
        source: Source,
        lanes: int,
        seed: int,
        shuffle: bool = True,
        order: Order | None = None,
    ):
        self.source, self.lanes, self.seed, self.shuffle = source, lanes, seed, shuffle
        self.order = order or Order(len(source))
        self.shard_length, self.fingerprint = 0, f"{len(source)} examples"
        if self.order.digest:
            self.fingerprint += f" weighted {self.order.digest}"
        self.faults: Sequence[dict[str, Any]] = getattr(source, "faults", ())
        self.examples = len(source) + sum(fault.get("samples", 1) for fault in self.faults)

    def lane(self, number: int, position: list[int] | None, pool: Executor) -> "IndexedLane":
        """Open lane `number`, at its start or at an earlier `position()`."""
        return IndexedLane(self, number, position[0] if position else 0)


class IndexedLane:
    """Lane of a random-access source; samples are read in the decoding threads."""

    def __init__(self, stream: IndexedStream, number: int, taken: int):
        self._stream, self._number, self._taken = stream, number, taken

    def __next__(self) -> Sample:
        stream = self._stream
        position = self._taken * stream.lanes + self._number
        index = position
        if stream.shuffle:
            index = stream.order.places(stream.seed, np.array([position]))[0]
        self._taken += 1
        return Sample(functools.partial(stream.source.__getitem__, int(index)), position)

    def position(self) -> list[int]:
        """Return the number of samples already taken."""
        return [self._taken]

    def close(self) -> None:
        """Do nothing: no file is open."""
