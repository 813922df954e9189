"""Interleaved readers (lanes) of a stream, and the batches made from them.

Rows l b to (l + 1) b - 1 of every global batch are the next b good samples of lane l; b may differ
between batches. A process owns whole lanes, and so does each of its workers. So batches are the
same for any number of workers, and for any number of processes that divides the lanes. The position
of a lane is sent with its rows, so it does not include prefetched samples.
"""

import collections
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import grain
import jax
import numpy as np

from vlm.cluster.processes import exchange_texts
from vlm.config import DataConfig
from vlm.data.batch_schedule import BatchSchedule
from vlm.data.faults import BadSample, TooManyBad
from vlm.data.shards import FILTERED, SHARD_READERS, Lane, Sample
from vlm.data.transform_example import ExampleTransform
from vlm.errors import ConfigError, DataError
from vlm.inputs.tokenizer import AnyTokenizer
from vlm.nn.naflex import Patches

MAX_DEFAULT_LANES = 256  # if the config does not set `interleave`
ONE_EACH = "one for each process"  # number of lanes of an iterable, in the history of a run

_CHUNK = 4  # samples per task of a decoding thread, from one lane or several
_MAX_FILTERED = 1_000_000  # in a row, before the filter counts as rejecting everything

Position = list[Any]  # of one lane: JSON


@runtime_checkable
class Stream(Protocol):
    """Data that can be read in lanes: shards, or a mixture of sources."""

    lanes: int
    seed: int
    fingerprint: str
    examples: int  # per epoch, known or estimated, with lost ones
    shard_length: int  # examples of one shard
    faults: Sequence[dict[str, Any]]  # known before the first step

    def lane(self, number: int, position: Position | None, pool: Executor) -> Lane: ...


def count_lanes(
    config: DataConfig,
    global_batch: int,
    shards: int,
    process_count: int,
    most: int = MAX_DEFAULT_LANES,
) -> int:
    """Return the number of lanes: that of the config, or the largest divisor of the batch.

    `shards` and `most` limit the latter.

    ConfigError if it does not divide the batch, or the processes do not divide it.
    """
    lanes = config.interleave
    if lanes is None:
        limit = min(most, shards, global_batch)
        lanes = max(n for n in range(1, limit + 1) if global_batch % n == 0)
    elif lanes < 1 or global_batch % lanes:
        raise ConfigError(
            f"data.interleave {lanes} does not divide the batch of {global_batch}: choose a divisor"
        )
    if lanes % process_count:
        raise ConfigError(
            f"{lanes} lanes cannot be shared evenly by {process_count} processes: set "
            f"data.interleave to a multiple of {process_count} that divides the batch of "
            f"{global_batch}"
            + (f"; there are {shards:,} shards, and each lane needs one" if shards < 2**31 else "")
        )
    return lanes


class LaneBatches(grain.IterDataset):
    """Infinite dataset of the rows that some lanes contribute to each batch.

    An element has `images`, `tokens`, `texts_cut` (which texts were truncated), `groups` (hashes of
    classes or captions), and as JSON `bad` (records) and `lanes` (positions after the element, by
    lane). The position is that of each lane.
    """

    length = None  # infinite

    def __init__(
        self,
        stream: Stream,
        lanes: Sequence[int],
        schedule: BatchSchedule,
        transforms: dict[int | None, ExampleTransform],
        tokenizer: AnyTokenizer,
        config: DataConfig,
    ):
        super().__init__()
        self.stream, self.transforms, self.tokenizer = stream, transforms, tokenizer
        self.lanes, self._schedule = list(lanes), schedule
        self.step = 0  # of the next batch to be read
        self.max_bad_in_a_row = config.max_bad_in_a_row
        # Decoding threads: all cores without workers, else one in each worker.
        self.threads = 1 if config.workers else os.cpu_count() or 1
        self.workers, self._prefetch = min(config.workers, len(self.lanes)), config.prefetch
        self.parts = max(1, self.workers)  # elements per batch
        text_bytes = 4 * tokenizer.config.context_length
        row_bytes = {n: made.image_bytes + text_bytes for n, made in transforms.items()}
        self.element_bytes = -(-len(self.lanes) // self.parts) * max(
            size.pairs // stream.lanes * row_bytes[size.patches] for size in schedule.sizes
        )
        # How to mix better; None if the order is the user's own.
        self.fix_mixing: str | None = getattr(stream, "fix_mixing", None)
        self.positions: dict[str, Position] = {}  # of lanes that have been read, as in JSON

    def size_at(self, step: int) -> tuple[int, int | None]:
        """Return the rows of each lane in the batch `step`, and its sequence length."""
        size = self._schedule.at(step)
        return size.pairs // self.stream.lanes, size.patches

    @property
    def most_rows(self) -> int:
        """Rows of a lane in the largest batch."""
        return max(self._schedule.sizes).pairs // self.stream.lanes

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Keep only the lanes of worker `sl.start` of `sl.step` (part of grain's interface)."""
        self.lanes = [part.tolist() for part in np.array_split(self.lanes, sl.step)][sl.start]

    def __iter__(self) -> "LaneIterator":
        return LaneIterator(self)

    def read(self) -> grain.IterDataset:
        """Return the elements from the current position."""
        if self.workers:
            return self
        return grain.experimental.ThreadPrefetchIterDataset(
            self, prefetch_buffer_size=self._prefetch
        )

    def join(self, elements: list[dict[str, Any]]) -> dict[str, Any]:
        """Join the elements of all workers into a batch; advance the position."""
        self.step += 1
        for element in elements:
            self.positions |= json.loads(element.pop("lanes"))
        first = elements[0]
        if len(elements) == 1:
            return first
        bad = [record for element in elements for record in json.loads(element.pop("bad"))]
        names = [name for name in first if name != "bad"]
        arrays = [{name: element[name] for name in names} for element in elements]
        return jax.tree.map(lambda *x: np.concatenate(x), *arrays) | {"bad": json.dumps(bad)}

    def state(self, step: int) -> dict[str, Any]:
        """Return the positions of all lanes; all processes must call it at the same step."""
        stream = self.stream
        lanes = gather_processes(self.positions)
        return {"step": step, "data": stream.fingerprint, "count": stream.lanes, "lanes": lanes}

    def start_at(self, step: int) -> None:
        """Let every lane start at its first sample with the batch `step`."""
        self.positions, self.step = {}, step

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the positions of `state`; DataError if shards or number of lanes differ."""
        stream = self.stream
        if state.get("data") != stream.fingerprint:
            raise DataError(
                f"the checkpoint is for other data ({state.get('data')!r}, here "
                f"{stream.fingerprint!r}: number of shards x parts of each, and hash of the "
                "shards' names): resume with the shards, index and version of vlm that the run "
                "started with, or start a new pass over these with another --seed"
            )
        if state.get("count") != stream.lanes:
            fix = getattr(stream, "fix_lanes", f"set data.interleave to {state.get('count')}")
            raise DataError(
                f"the checkpoint has {state.get('count')} lanes and the run has {stream.lanes}: "
                f"{fix}"
            )
        lanes = state.get("lanes")
        mine = [str(number) for number in self.lanes]
        if not isinstance(lanes, dict) or (lanes and not set(mine) <= set(lanes)):
            raise DataError("the checkpoint lacks positions of lanes: it belongs to another run")
        self.positions = {number: lanes[number] for number in mine if number in lanes}
        self.step = state["step"]


class _DecodedSample(NamedTuple):
    """A decoded sample: its text (or fault), its image, and the position of the lane after it.

    `group` is a hash of its class or caption. `source` is the sample itself if batches differ in
    their sequence length, since an earlier bad sample may move it to a batch of another length.
    """

    text: str | BadSample | None
    group: int
    images: np.ndarray | Patches  # contains the image at `row`
    row: int
    after: Position
    patches: int | None  # sequence length that it was decoded for
    source: Sample | None


_Chunk = tuple[int, list[tuple[Sample, Position]]]  # lane, and its next samples to decode


class _Task(NamedTuple):
    """A chunk in a task of the decoders: it has `start` to `end` of the results."""

    future: Future[list[_DecodedSample]]
    start: int
    end: int


class LaneIterator(grain.DatasetIterator):
    """Iterator that reads and decodes in threads, up to one batch ahead."""

    def __init__(self, batches: LaneBatches):
        super().__init__()
        self._batches = batches
        readers = getattr(batches.stream, "readers", SHARD_READERS)
        self._readers = ThreadPoolExecutor(min(readers, len(batches.lanes)), "read")
        self._decoders = ThreadPoolExecutor(max(1, batches.threads), "decode")
        self._lanes: dict[int, Lane] = {}
        for number in batches.lanes:
            position = batches.positions.get(str(number))
            self._lanes[number] = batches.stream.lane(number, position, self._readers)
        self._ahead = {number: collections.deque[_Task]() for number in self._lanes}
        self._ready = {number: collections.deque[_DecodedSample]() for number in self._lanes}
        self._in_a_row = dict.fromkeys(self._lanes, 0)
        self._filtered = dict.fromkeys(self._lanes, 0)
        self._max_ahead = -(-batches.most_rows // _CHUNK) * 2  # chunks decoded ahead per lane
        self._step = batches.step
        # Step and row of the next sample to decode, if none before it is bad.
        self._next_row: dict[int, tuple[int, int]] = dict.fromkeys(self._lanes, (self._step, 0))

    def __next__(self) -> dict[str, Any]:
        b = self._batches
        rows, patches = b.size_at(self._step)
        images = b.transforms[patches].blank(len(self._lanes) * rows)
        parts = jax.tree.leaves(images)
        texts: list[str] = []
        groups: list[int] = []
        bad: list[dict[str, str]] = []
        after: dict[str, Position] = {}
        self._fill(self._lanes)
        for number in self._lanes:
            for _ in range(rows):
                sample, text = self._next_good(number, patches, bad)
                after[str(number)] = sample.after
                for batch, source in zip(parts, jax.tree.leaves(sample.images), strict=True):
                    batch[len(texts)] = source[sample.row]
                texts.append(text)
                groups.append(sample.group)
        self._step += 1
        self._fill(self._lanes)  # decoders run during tokenization
        tokens, cut = b.tokenizer.rows(texts)
        return {
            "images": images,
            "tokens": tokens,
            "texts_cut": cut,
            "groups": np.array(groups, np.uint32),
            "bad": json.dumps(bad),
            "lanes": json.dumps(after),
        }

    def get_state(self) -> dict[str, Any]:
        """Return an empty state: positions are sent with the elements."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Do nothing: an iterator starts at the `positions` of its dataset."""

    def close(self) -> None:
        """Stop reading and decoding."""
        self._decoders.shutdown(cancel_futures=True)
        for lane in self._lanes.values():
            lane.close()
        self._readers.shutdown(cancel_futures=True)

    def _next_good(self, number: int, patches: int | None, bad: list) -> tuple[_DecodedSample, str]:
        ready = self._ready[number]
        while True:
            while not ready:
                self._fill([number])
                future, start, end = self._ahead[number].popleft()
                ready.extend(future.result()[start:end])
            sample = ready.popleft()
            if sample.source is not None and sample.patches != patches:
                sample = self._decode([(sample.source, sample.after)], patches)[0]
            if isinstance(sample.text, str):
                self._in_a_row[number] = self._filtered[number] = 0
                return sample, sample.text
            if not isinstance(sample.text, BadSample):  # FILTERED
                if sample.source is not None and sample.source.example is not FILTERED:
                    self._move(number, -1)  # it was read when it was decoded
                self._filtered[number] += 1
                if self._filtered[number] == _MAX_FILTERED:
                    raise DataError(
                        f"data.filters rejected the last {_MAX_FILTERED:,} examples of lane "
                        f"{number}: loosen it"
                    )
                continue
            bad.append(sample.text.record())
            self._move(number, -1)
            self._in_a_row[number] += 1
            if self._in_a_row[number] >= self._batches.max_bad_in_a_row:
                raise TooManyBad.in_a_row(self._in_a_row[number], sample.text)

    def _fill(self, numbers: Iterable[int]) -> None:
        """Start to decode the next samples of lanes; a task has at least `_CHUNK`, if it can."""
        waiting: list[_Chunk] = []
        count, length = 0, None
        for number in numbers:
            ahead, lane = self._ahead[number], self._lanes[number]
            for _ in range(self._max_ahead - len(ahead)):
                step, row = self._next_row[number]
                rows, patches = self._batches.size_at(step)
                if count >= _CHUNK or patches != length:
                    self._submit(waiting, length)
                    waiting, count, length = [], 0, patches
                samples = [(next(lane), lane.position()) for _ in range(min(_CHUNK, rows - row))]
                waiting.append((number, samples))
                count += len(samples)
                self._move(number, sum(sample.example is not FILTERED for sample, _ in samples))
        self._submit(waiting, length)

    def _submit(self, chunks: list[_Chunk], patches: int | None) -> None:
        """Submit a task for the chunks of several lanes; nothing if there are none."""
        if not chunks:
            return
        samples = [sample for _, own in chunks for sample in own]
        future, start = self._decoders.submit(self._decode, samples, patches), 0
        for number, own in chunks:
            self._ahead[number].append(_Task(future, start, start + len(own)))
            start += len(own)

    def _move(self, number: int, rows: int) -> None:
        """Move the next row to decode of a lane by at most the rest of its batch."""
        step, row = self._next_row[number]
        row += rows
        if row < 0:
            step -= 1
            row += self._batches.size_at(step)[0]
        elif row == self._batches.size_at(step)[0]:
            step, row = step + 1, 0
        self._next_row[number] = step, row

    def _decode(
        self, samples: list[tuple[Sample, Position]], patches: int | None
    ) -> list[_DecodedSample]:
        transform, seed = self._batches.transforms[patches], self._batches.stream.seed
        mixed = len(self._batches.transforms) > 1
        draws = transform.draws(seed, np.array([sample.position for sample, _ in samples]))
        images, decoded = transform.blank(len(samples)), []
        for row, ((sample, after), u) in enumerate(zip(samples, draws, strict=True)):
            text, group = sample.example, 0
            try:
                if callable(text):  # read here, in one of several threads
                    text = text()
                if isinstance(text, dict):
                    group = transform.group(text)
                    text = transform(text, u, images, row, "an example")
            except BadSample as fault:
                text = fault
            source = sample if mixed else None
            decoded.append(_DecodedSample(text, group, images, row, after, patches, source))
        return decoded


def gather_processes(own: dict[str, Any]) -> dict[str, Any]:
    """Merge the dicts of all processes, whose keys differ; all processes must call it."""
    if jax.process_count() == 1 or not own:
        return dict(own)
    gathered: dict[str, Any] = {}
    for text in exchange_texts(json.dumps(own)):
        gathered |= json.loads(text)
    return dict(sorted(gathered.items(), key=lambda item: int(item[0])))
