"""Examples to batches. A training batch is a pure function of its step; grain reads ahead.

Sample g of a run (counted over all processes and epochs) is example `shuffle(g mod n)` of epoch
g // n, and its crop, colours and caption are drawn from g. Global batch i holds samples i B to
(i + 1) B - 1 and each process makes its own slice. So a run resumes exactly from a step
number, on any number of processes or workers, and within an epoch no sample is lost or repeated.
"""

import os
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Int
from PIL import Image

from vlm.config import DataConfig
from vlm.data.randomness import permute, uniforms
from vlm.data.sources import CachedSource, Source, captions_of, open_source
from vlm.data.transforms import DRAWS, Augment
from vlm.data.workers import (
    buffered_batches,
    check_shared_memory,
    deaf_to_signals,
    end_with_parent,
)
from vlm.errors import ConfigError, DataError
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import Tokenizer

Batch = dict[str, Any]

_FOREVER = 2**40  # steps: grain wants a length, and nobody trains this long


class TrainBatches:
    """Random access to the training batches of one process: `batches[step]`."""

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        preprocess: Preprocess,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        epochs: float | None = None,
    ):
        _check_share(batch_size, process_index, process_count)
        self._source = source
        self._config = config
        self._tokenizer = tokenizer
        self._preprocess = preprocess
        self._augment = Augment(
            config.augment, preprocess.config.image_size, preprocess.config.kernel
        )
        self._seed = seed
        self._batch_size = batch_size
        self._global_batch = batch_size * process_count
        self._offset = batch_size * process_index
        self._length = _FOREVER
        if self._global_batch > len(source):
            raise DataError(
                f"the global batch of {self._global_batch} is larger than the {len(source)} "
                f"examples of {config.source} {config.train_split}: choose a smaller batch_size"
            )
        if epochs is not None:
            self._length = int(epochs * len(source)) // self._global_batch

    def __len__(self) -> int:
        return self._length

    @property
    def batch_bytes(self) -> int:
        """Of one batch of this process, pixels and tokens."""
        size, length = self._preprocess.config.image_size, self._tokenizer.config.context_length
        return self._batch_size * (size * size * 3 + 4 * length)

    def __getitem__(self, step: int) -> Batch:
        first = int(step) * self._global_batch + self._offset
        positions = np.arange(first, first + self._batch_size)
        draws = uniforms(self._seed, positions, DRAWS + 1)  # the last one chooses the caption
        size = self._preprocess.config.image_size
        images = np.empty((self._batch_size, size, size, 3), np.uint8)
        texts = []
        for row, u, index in zip(images, draws, self.indices(positions), strict=True):
            example = self._source[index]
            image = example[self._config.image]
            if not isinstance(image, Image.Image):  # else cached: RGB already
                image = self._preprocess.open(image, f"the image of example {index}")
            self._augment(image, u[:-1], row)
            captions = captions_of(example, self._config)
            texts.append(captions[int(u[-1] * len(captions))])
        return {"images": images, "tokens": self._tokenizer(texts)}

    def indices(self, positions: Int[np.ndarray, "b"]) -> list[int]:
        """Which example stands at each position of the run."""
        count = len(self._source)
        epochs, places = positions // count, positions % count
        out = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            out[here] = permute(self._seed, epoch, places[here], count)
        return out.tolist()


class TrainIterator(grain.DatasetIterator):
    """Batches in order, made ahead by threads or worker processes.

    The state is the next step's number, whatever the workers have read ahead.
    """

    def __init__(self, batches: TrainBatches, *, prefetch: int, threads: int, workers: int):
        super().__init__()
        self._batches = batches
        self._prefetch, self._threads, self._workers = prefetch, threads, workers
        self._step = 0
        self._reader: grain.DatasetIterator | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def __next__(self) -> Batch:
        if self._reader is not None:
            batch = next(self._reader)
        else:
            self._reader = self._read_from(self._step)
            with deaf_to_signals():  # grain starts its workers when it is asked for a batch
                batch = next(self._reader)
        self._step += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """What a checkpoint needs to go on from here: plain JSON."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Go on as the iterator would have that gave `state`.

        Raises:
            DataError: not a state of this iterator.
        """
        step = state.get("step") if isinstance(state, dict) else None
        if not isinstance(step, int) or not 0 <= step <= len(self._batches):
            raise DataError(f"{state!r} is not the state of a data iterator of this run")
        self.close()
        self._step = step

    def start_prefetch(self) -> None:
        """Begin to read ahead before the first batch is asked for, say while a step compiles."""
        if self._reader is None:
            self._reader = self._read_from(self._step)
            self._reader.start_prefetch()

    def close(self) -> None:
        """Stop the readers; the iterator can go on later."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _read_from(self, step: int) -> grain.DatasetIterator:
        data = grain.MapDataset.source(self._batches).slice(slice(step, None))
        if self._workers:
            if not flags.FLAGS.is_parsed():  # grain's workers read absl flags, which we do not use
                flags.FLAGS.mark_as_parsed()
            check_shared_memory(self._workers, self._prefetch, self._batches.batch_bytes)
            buffer, _ = buffered_batches(self._workers, self._prefetch)
            options = grain.MultiprocessingOptions(
                num_workers=self._workers, per_worker_buffer_size=buffer
            )
            read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
            return iter(data.to_iter_dataset(read).mp_prefetch(options, end_with_parent))
        read = grain.ReadOptions(
            num_threads=self._threads if self._prefetch else 0, prefetch_buffer_size=self._prefetch
        )
        return iter(data.to_iter_dataset(read))


def train_batches(
    config: DataConfig,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    epochs: float | None = None,
) -> TrainIterator:
    """This process's training batches: `images` uint8 (b, s, s, 3), `tokens` int32 (b, l).

    `batch_size` is this process's share. Without `epochs` the batches never end. The iterator's
    `get_state` and `set_state` make it part of a checkpoint.

    Raises:
        DataError: no such data, an image that cannot be read, or a batch larger than the data.
        ConfigError: sizes or options that cannot be.
    """
    if config.cache and config.workers:
        raise ConfigError(
            f"data.cache keeps images in this process, so data.workers {config.workers} processes "
            "could not share it: set one of them off"
        )
    source = open_source(config, config.train_split)
    batches = TrainBatches(
        CachedSource(source, config.image, preprocess) if config.cache else source,
        config,
        preprocess,
        tokenizer,
        batch_size=batch_size,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
        epochs=epochs,
    )
    # Decoding releases the GIL and gains from more threads; what follows it does not.
    threads = 1 if config.cache else min(config.prefetch, os.cpu_count() or 1)
    return TrainIterator(batches, prefetch=config.prefetch, threads=threads, workers=config.workers)


def eval_batches(
    config: DataConfig,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    split: str | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """One pass over a split, in order, as the model is used: no augmentation, first captions.

    Besides `images` and `tokens` a batch has `captions` (list of str), `ids` int32 (b,), the
    example's index in the split, and `mask` bool (b,). The last batches are filled up to
    `batch_size` with blank rows (id -1, mask False), so that every process makes as many.

    Raises:
        DataError: no such data, or an image that cannot be read.
    """
    _check_share(batch_size, process_index, process_count)
    split = split or config.eval_split
    if not split:
        raise DataError("data.eval_split is not set: name the split to evaluate on")
    source = open_source(config, split)
    size = preprocess.config.image_size
    stride = batch_size * process_count
    for first in range(batch_size * process_index, _round_up(len(source), stride), stride):
        ids = np.arange(first, first + batch_size, dtype=np.int32)
        mask = ids < len(source)
        images = np.zeros((batch_size, size, size, 3), np.uint8)
        captions = [""] * batch_size
        for row in np.flatnonzero(mask):
            example = source[int(ids[row])]
            images[row] = preprocess.pixels(
                example[config.image], f"the image of example {ids[row]}"
            )
            captions[row] = captions_of(example, config)[0]
        yield {
            "images": images,
            "tokens": tokenizer(captions),
            "captions": captions,
            "ids": np.where(mask, ids, -1).astype(np.int32),
            "mask": mask,
        }


def count_examples(config: DataConfig, split: str | None = None) -> int:
    """Number of examples in a split, by default the training split."""
    return len(open_source(config, split or config.train_split))


def _check_share(batch_size: int, process_index: int, process_count: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size} is empty: make it at least 1 per process")
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process {process_index} of {process_count} does not exist")


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
