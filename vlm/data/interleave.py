"""Batches out of lanes: the same for any number of workers, and of processes that divides them.

Rows l b to (l + 1) b - 1 of every global batch come from lane l, the next b good samples of it. A
process owns whole lanes, and so does each of its workers, who make their rows of every batch. The
position of a lane travels with the rows, so that what workers have read ahead never counts.
"""

import collections
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import grain
import jax
import numpy as np

from vlm.cluster.processes import exchange_texts
from vlm.config import DataConfig
from vlm.data.faults import BadSample, TooManyBad
from vlm.data.shards import FILTERED, Lane, Sample
from vlm.data.transform_example import ExampleTransform
from vlm.errors import ConfigError, DataError
from vlm.inputs.two_tokenizers import AnyTokenizer
from vlm.nn.naflex import Patches

MOST_LANES = 256  # chosen for a config that does not say

_READERS = 32  # threads that wait for the disk or the bucket
_CHUNK = 4  # samples that a thread makes at a time
_MAX_FILTERED = 1_000_000  # in a row, before the filter is taken to let nothing through

Position = list[Any]  # of one lane: JSON


@runtime_checkable
class Stream(Protocol):
    """What can be read in lanes: shards, or a mixture of sources."""

    lanes: int
    seed: int

    @property
    def fingerprint(self) -> str: ...

    @property
    def examples(self) -> int: ...  # of an epoch, as far as is known, with those that are lost

    @property
    def typical(self) -> int: ...  # examples of one shard

    @property
    def faults(self) -> Sequence[dict[str, Any]]: ...  # of shards, known before the first step

    def lane(self, number: int, position: Position | None, pool: Executor) -> Lane: ...


def count_lanes(config: DataConfig, global_batch: int, shards: int, process_count: int) -> int:
    """The number of lanes: the config's, or the largest divisor of the batch that shards can fill.

    Raises:
        ConfigError: it does not divide the batch, or the processes do not divide it.
    """
    lanes = config.lanes
    if lanes is None:
        most = min(MOST_LANES, shards, global_batch)
        lanes = max(n for n in range(1, most + 1) if global_batch % n == 0)
    elif lanes < 1 or global_batch % lanes:
        raise ConfigError(
            f"data.lanes {lanes} does not divide the batch of {global_batch}: choose a divisor"
        )
    if lanes % process_count:
        raise ConfigError(
            f"{lanes} lanes cannot be shared evenly by {process_count} processes: set data.lanes "
            f"to a multiple of {process_count} that divides the batch of {global_batch}"
            + (f"; there are {shards:,} shards, one lane needs one" if shards < 2**31 else "")
        )
    return lanes


class LaneBatches(grain.IterDataset):
    """The rows that some lanes contribute to each batch, without end.

    An element has `images`, `tokens`, `texts_cut` (which texts lost their tail), and as JSON `bad`
    (records) and `lanes` (their positions after it, by number).
    """

    def __init__(
        self,
        stream: Stream,
        lanes: Sequence[int],
        rows: int,
        transform: ExampleTransform,
        tokenizer: AnyTokenizer,
        *,
        max_bad_in_a_row: int,
        threads: int,
    ):
        super().__init__()
        self.stream, self.rows, self.transform, self.tokenizer = stream, rows, transform, tokenizer
        self.lanes = list(lanes)
        self.max_bad_in_a_row, self.threads = max_bad_in_a_row, threads
        self.starts: Mapping[int, Position] = {}

    def element_bytes(self, parts: int) -> int:
        """Of one element where `parts` of them make a batch, pixels and tokens."""
        of_one = self.transform.image_bytes + 4 * self.tokenizer.config.context_length
        return -(-len(self.lanes) // parts) * self.rows * of_one

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Keep the lanes of worker `sl.start` of `sl.step`: what grain asks of its sources."""
        self.lanes = [part.tolist() for part in np.array_split(self.lanes, sl.step)][sl.start]

    def __iter__(self) -> "LaneIterator":
        return LaneIterator(self)


class _DecodedSample(NamedTuple):
    """A sample on its way: what it became, and where its lane stood after it."""

    text: str | BadSample | None
    images: np.ndarray | Patches  # its image is at `row` of these
    row: int


class _Chunk(NamedTuple):
    made: Future
    after: list[Position]


class LaneIterator(grain.DatasetIterator):
    """Reads and decodes in threads, ahead by as much as one batch."""

    def __init__(self, batches: LaneBatches):
        super().__init__()
        self._batches = batches
        self._readers = ThreadPoolExecutor(min(_READERS, len(batches.lanes)), "read")
        self._decoders = ThreadPoolExecutor(max(1, batches.threads), "decode")
        self._lanes = {
            number: batches.stream.lane(number, batches.starts.get(number), self._readers)
            for number in batches.lanes
        }
        self._ahead = {number: collections.deque[_Chunk]() for number in self._lanes}
        self._ready = {number: collections.deque() for number in self._lanes}
        self._in_a_row = dict.fromkeys(self._lanes, 0)
        self._filtered = dict.fromkeys(self._lanes, 0)
        self._reach = -(-batches.rows // _CHUNK) * 2  # chunks decoded ahead in each lane

    def __next__(self) -> dict[str, Any]:
        b, rows = self._batches, self._batches.rows
        images = b.transform.blank(len(self._lanes) * rows)
        parts = jax.tree.leaves(images)
        texts: list[str] = []
        bad: list[dict[str, str]] = []
        after: dict[str, Position] = {}
        for number in self._lanes:
            self._fill(number)
        for number in self._lanes:
            for _ in range(rows):
                made, text, after[str(number)] = self._next_good(number, bad)
                for batch, source in zip(parts, jax.tree.leaves(made.images), strict=True):
                    batch[len(texts)] = source[made.row]
                texts.append(text)
        for number in self._lanes:
            self._fill(number)  # decoders go on while the texts become tokens
        tokens, cut = b.tokenizer.rows(texts)
        return {
            "images": images,
            "tokens": tokens,
            "texts_cut": cut,
            "bad": json.dumps(bad),
            "lanes": json.dumps(after),
        }

    def get_state(self) -> dict[str, Any]:
        """Nothing: positions travel with the elements."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Not used: an iterator begins at its dataset's `starts`."""

    def close(self) -> None:
        """Stop reading and decoding."""
        self._decoders.shutdown(cancel_futures=True)
        for lane in self._lanes.values():
            lane.close()
        self._readers.shutdown(cancel_futures=True)

    def _next_good(self, number: int, bad: list) -> tuple[_DecodedSample, str, Position]:
        ready = self._ready[number]
        while True:
            while not ready:
                self._fill(number)
                chunk = self._ahead[number].popleft()
                ready.extend(zip(chunk.made.result(), chunk.after, strict=True))
            made, position = ready.popleft()
            if isinstance(made.text, str):
                self._in_a_row[number] = self._filtered[number] = 0
                return made, made.text, position
            if made.text is FILTERED:
                self._filtered[number] += 1
                if self._filtered[number] == _MAX_FILTERED:
                    raise DataError(
                        f"data.keep has passed none of the last {_MAX_FILTERED:,} examples of lane "
                        f"{number}: loosen it"
                    )
                continue
            bad.append(made.text.record())
            self._in_a_row[number] += 1
            if self._in_a_row[number] >= self._batches.max_bad_in_a_row:
                raise TooManyBad.in_a_row(self._in_a_row[number], made.text)

    def _fill(self, number: int) -> None:
        ahead, lane = self._ahead[number], self._lanes[number]
        while len(ahead) < self._reach:
            samples, after = [], []
            for _ in range(min(_CHUNK, self._batches.rows)):
                samples.append(next(lane))
                after.append(lane.position())
            ahead.append(_Chunk(self._decoders.submit(self._make, samples), after))

    def _make(self, samples: list[Sample]) -> list[_DecodedSample]:
        transform, seed = self._batches.transform, self._batches.stream.seed
        draws = transform.draws(seed, np.array([sample.position for sample in samples]))
        images, made = transform.blank(len(samples)), []
        for row, (sample, u) in enumerate(zip(samples, draws, strict=True)):
            text = sample.example
            try:
                if callable(text):  # read here, in one of several threads
                    text = text()
                if isinstance(text, dict):
                    text = transform(text, u, images, row, "an example")
            except BadSample as fault:
                text = fault
            made.append(_DecodedSample(text, images, row))
        return made


class LaneOrder:
    """The order of a stream's batches, for `TrainIterator`: positions by lane."""

    length = None  # without end

    def __init__(self, batches: LaneBatches, workers: int, prefetch: int):
        self._batches = batches
        self.workers = min(workers, len(batches.lanes))
        self.parts = max(1, self.workers)  # elements that make a batch
        self.element_bytes = batches.element_bytes(self.parts)
        self._prefetch = prefetch
        self._at: dict[str, Position] = {}

    @property
    def stream(self) -> Stream:
        """What is read."""
        return self._batches.stream

    def read(self) -> grain.IterDataset:
        """The elements from the position on."""
        self._batches.starts = {int(number): at for number, at in self._at.items()}
        if self.workers:
            return self._batches
        return grain.experimental.ThreadPrefetchIterDataset(
            self._batches, prefetch_buffer_size=self._prefetch
        )

    def join(self, elements: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch that the elements of all workers make; the position moves behind it."""
        for element in elements:
            self._at |= json.loads(element.pop("lanes"))
        first = elements[0]
        if len(elements) == 1:
            return first
        bad = [record for element in elements for record in json.loads(element.pop("bad"))]
        names = [name for name in first if name != "bad"]
        arrays = [{name: element[name] for name in names} for element in elements]
        return jax.tree.map(lambda *x: np.concatenate(x), *arrays) | {"bad": json.dumps(bad)}

    def state(self, step: int) -> dict[str, Any]:
        """The positions of all lanes, of all processes: every process must ask at the same step."""
        stream = self._batches.stream
        return {
            "step": step,
            "data": stream.fingerprint,
            "count": stream.lanes,
            "lanes": of_all_processes(self._at),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go to the positions of `state`.

        Raises:
            DataError: it is of other shards, or of another number of lanes.
        """
        stream = self._batches.stream
        if state.get("data") != stream.fingerprint:
            raise DataError(
                f"the position is of other data ({state.get('data')!r}, here "
                f"{stream.fingerprint!r}: number and names of the shards): resume with the shards "
                "that the run began with"
            )
        if state.get("count") != stream.lanes:
            raise DataError(
                f"the position is of {state.get('count')} lanes and the run has {stream.lanes}: "
                f"set data.lanes to {state.get('count')}"
            )
        lanes = state.get("lanes")
        mine = [str(number) for number in self._batches.lanes]
        if not isinstance(lanes, dict) or (lanes and not set(mine) <= set(lanes)):
            raise DataError("the position of a stream lacks lanes: it is of another run")
        self._at = {number: lanes[number] for number in mine if number in lanes}


def threads_for(config: DataConfig) -> int:
    """Decoding threads of a process: all cores in one process, else one in each worker."""
    return 1 if config.workers else os.cpu_count() or 1


def of_all_processes(at: dict[str, Any]) -> dict[str, Any]:
    """What every process has under its own numbers, together; all of them must ask at once."""
    if jax.process_count() == 1 or not at:
        return dict(at)
    gathered: dict[str, Any] = {}
    for text in exchange_texts(json.dumps(at)):
        gathered |= json.loads(text)
    return dict(sorted(gathered.items(), key=lambda item: int(item[0])))
