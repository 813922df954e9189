"""Input pipeline: training batches with a checkpointable position, and evaluation batches.

`random_access` and `interleave` make the batches; grain runs them ahead in threads or processes.
"""

import collections
import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from etils import epath

from vlm.config import DataConfig
from vlm.config.batch_sizes import BatchSize
from vlm.config.resume import begins_new_pass, position_fields
from vlm.data.batch_schedule import BatchSchedule
from vlm.data.examples import captions_of
from vlm.data.faults import BadSamples
from vlm.data.interleave import ONE_EACH, LaneBatches, gather_processes
from vlm.data.mixing import MixingMonitor
from vlm.data.mixture import part_configs
from vlm.data.python_source import check_workers, has_length, is_named
from vlm.data.random_access import Batch, TrainBatches
from vlm.data.randomness import key
from vlm.data.reinforced import Reinforced
from vlm.data.sources import CachedSource, open_source, open_stream, streams
from vlm.data.text_buckets import TextBuckets
from vlm.data.transform_example import transforms_by_length
from vlm.data.weighted_order import order_of
from vlm.data.workers import buffered_batches, check_shared_memory, end_with_parent, signals_blocked
from vlm.errors import ConfigError, DataError, warn_once
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import AnyTokenizer, Tokenizer
from vlm.sharding import maximum_over_processes

logger = logging.getLogger(__name__)

Order = TrainBatches | LaneBatches


class TrainIterator(grain.DatasetIterator):
    """Iterator over training batches, prefetched by threads or worker processes.

    Its state is the position of the next batch, independent of what the workers have prefetched,
    and the fields of the config that the position depends on.

    Args:
        order: the batches, from their start.
        reopen: makes them for another seed, with the lanes for a global batch.
        depends: the fields that the position depends on.
        schedule: the sizes of the global batches.
        finish: applied to each batch.
        texts: splits the texts of each batch by length.
        part: index and number of this process's part of a global batch.
    """

    def __init__(
        self,
        order: Order,
        *,
        reopen: Callable[[int, int], Order],
        depends: dict[str, Any],
        schedule: BatchSchedule,
        prefetch: int,
        bad: BadSamples,
        finish: Callable[[Batch], Batch],
        texts: TextBuckets | None = None,
        part: tuple[int, int] = (0, 1),
        description: str = "",
    ):
        super().__init__()
        self._reopen, self._depends, self.schedule = reopen, depends, schedule
        self.samples = 0  # of all processes before the next batch
        self.position_change = ""  # what `resume` did about changed fields
        self._pass_step = 0  # first step of this pass over the data
        self._planned_for = schedule.divisor  # the batch that a stream's lanes are chosen for
        self.description = description  # number of examples, and how they are read
        self._order, self._prefetch, self._finish = order, prefetch, finish
        self.bad = bad  # counts of bad samples and truncated texts so far
        self._step = 0
        self._fix_mixing = getattr(order, "fix_mixing", None)
        self._mixing = MixingMonitor()
        self._reader: grain.DatasetIterator | None = None
        self._texts, self._part = texts, part
        # Elements of batches that have been read, with the text lengths that the processes need.
        self._ahead: collections.deque[tuple[list[Batch], Any]] = collections.deque()

    def __len__(self) -> int:
        if self._order.length is None:
            raise TypeError(
                "a stream has no length: set the length of the run in steps or examples"
            )
        return self._order.length

    def __next__(self) -> Batch:
        if self._reader is not None:
            elements = self._take()
        else:
            self._reader = self._open()
            with signals_blocked():  # grain starts its workers at the first batch
                elements = self._take()
        elements, needs = elements
        batch = self._order.join(elements)
        cut = int(batch.pop("texts_cut").sum())
        self.bad.take(self._step, len(batch["tokens"]), json.loads(batch.pop("bad")), cut)
        self.samples += self.schedule.at(self._step).pairs
        self._step += 1
        groups = batch.pop("groups", None)
        if self._fix_mixing and groups is not None and (found := self._mixing.add(groups)):
            warn_once(
                f"a batch of {found.batch:,} has {found.distinct:,.0f} distinct classes or "
                f"captions, and would have {found.random:,.0f} or more in random order: "
                f"{self._fix_mixing}"
            )
        batch = self._finish(batch)
        if self._texts is None:
            return batch
        index, count = self._part
        first_row = index * (self.schedule.at(self._step - 1).pairs // count)
        return self._texts.split(batch, np.asarray(needs), first_row)

    @property
    def step(self) -> int:
        """Number of the next batch."""
        return self._step

    @property
    def history(self) -> dict[str, Any]:
        """Columns for the history of a run: `data`, what `resume` did, and `lanes` of a stream."""
        columns: dict[str, Any] = {}
        if self.position_change:
            columns["data"] = self.position_change
        if isinstance(self._order, LaneBatches):
            stream = self._order.stream
            columns["lanes"] = ONE_EACH if hasattr(stream, "fix_lanes") else stream.lanes
        return columns

    def get_state(self) -> dict[str, Any]:
        """Return the state for a checkpoint: JSON values, equal in all processes.

        All processes must call it at the same step.
        """
        bad = {str(self.bad.process_index): self.bad.state()}
        return {
            **self._order.state(self._step),
            "samples": self.samples,
            "pass_step": self._pass_step,
            "planned_for": self._planned_for,
            "depends": self._depends,
            "bad": gather_processes(bad),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a `state` that `get_state` returned; DataError if it is of another run."""
        self._restore(state, may_begin=False)

    def resume(self, state: dict[str, Any]) -> None:
        """Continue as `set_state` does, although fields of the config may have changed.

        The pass over the data continues where its position still fits: each example is then used at
        most once in it. Else a new pass begins, in a new order, and bad samples are counted from
        zero. `position_change` says which.

        Raises:
            DataError: the state is of another run, or of other data although no field changed.
        """
        self._restore(state, may_begin=True)

    def _restore(self, state: dict[str, Any], *, may_begin: bool) -> None:
        step = state.get("step") if isinstance(state, dict) else None
        length = self._order.length
        if not isinstance(step, int) or step < 0 or (length is not None and step > length):
            raise DataError(f"{state!r} is not the state of a data iterator of this run")
        before = state.get("depends", self._depends)  # missing in older checkpoints
        changed = [n for n, value in self._depends.items() if before.get(n, value) != value]
        continued = not (may_begin and begins_new_pass(changed))
        if continued:
            try:
                self._continue(state)
            except (ConfigError, DataError) as error:
                if not (may_begin and changed):
                    raise
                continued = False
                logger.info("the position in the data does not fit: %s", error)
        if not continued:
            self._pass_step = step
            self._planned_for = self.schedule.divisor
            self._order = self._reopen(_pass_seed(self._depends["seed"], step), self._planned_for)
            self._order.start_at(step)
        self._step, self.samples = step, state.get("samples", step * self._depends["batch_size"])
        self.bad.restore(state.get("bad", {}) if continued else {}, step)
        self.close()
        what = "continues" if continued else "starts a new pass"
        why = " and ".join("--" + name.replace("_", "-") for name in changed)
        self.position_change = f"{what} at step {step:,} (changed: {why})" if changed else ""

    def _continue(self, state: dict[str, Any]) -> None:
        """Restore the position of a state; DataError or ConfigError if it does not fit."""
        pass_step, planned = state.get("pass_step", 0), self._planned_for
        order, before = self._order, state.get("depends", self._depends)
        by_batch_size = isinstance(order, LaneBatches) and not hasattr(order.stream, "fix_lanes")
        if by_batch_size and self._depends["data.interleave"] is None:
            planned = state.get("planned_for", before.get("batch_size", planned))
        if pass_step != self._pass_step or planned != self._planned_for:
            seed = _pass_seed(self._depends["seed"], pass_step)
            self._order, self._pass_step = self._reopen(seed, planned), pass_step
            self._planned_for = planned
        self._order.restore(state)

    def start_prefetch(self) -> None:
        """Start prefetching before the first batch is requested, for example during compilation."""
        if self._reader is None:
            self._reader = self._open()
            self._reader.start_prefetch()

    def close(self) -> None:
        """Stop the readers; the iterator can continue later."""
        self.bad.flush()
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        self._ahead.clear()

    def _take(self) -> tuple[list[Batch], Any]:
        """Return the elements of the next batch, and the text lengths that it needs.

        With several processes one more batch is read, so that the devices find their common
        lengths while the step before it runs.
        """
        several = self._texts is not None and jax.process_count() > 1
        with contextlib.suppress(StopIteration):  # the last batch has none after it
            while len(self._ahead) < 1 + several:
                self._ahead.append(self._read())
        if not self._ahead:
            raise StopIteration
        return self._ahead.popleft()

    def _read(self) -> tuple[list[Batch], Any]:
        assert self._reader is not None
        elements = [next(self._reader) for _ in range(self._order.parts)]
        if self._texts is None:
            return elements, None
        tokens = np.concatenate([element["tokens"] for element in elements])
        return elements, maximum_over_processes(self._texts.needs(tokens))

    def _open(self) -> grain.DatasetIterator:
        data = self._order.read()
        if self._order.workers:
            if not flags.FLAGS.is_parsed():  # grain's workers read absl flags: none are used here
                flags.FLAGS.mark_as_parsed()
            ahead = self._prefetch * self._order.parts
            check_shared_memory(self._order.workers, ahead, self._order.element_bytes)
            buffer, _ = buffered_batches(self._order.workers, ahead)
            options = grain.MultiprocessingOptions(
                num_workers=self._order.workers, per_worker_buffer_size=buffer
            )
            data = data.mp_prefetch(options, end_with_parent)
        return iter(data)


def train_batches(
    config: DataConfig,
    preprocess: Preprocess,
    tokenizer: AnyTokenizer,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    epochs: float | None = None,
    run_folder: epath.PathLike | None = None,
    reinforced: Reinforced | None = None,
    finish: Callable[[Batch], Batch] = lambda batch: batch,
    schedule: BatchSchedule | None = None,
    texts: TextBuckets | None = None,
) -> TrainIterator:
    """Iterate over training batches: `images` uint8 (b, s, s, 3), `tokens` int32 (b, l).

    For a NaFlex model `images` is `vlm.nn.Patches` of uint8 arrays (b, max_patches, ...). With
    stored teacher embeddings a batch has `teacher_image` and `teacher_text` (b, e). Bad samples are
    replaced, counted in the iterator's `bad`, and listed in `bad-samples.jsonl` of `run_folder`.
    Texts longer than the tokenizer's context are truncated, and counted there too. The iterator's
    `get_state` and `set_state` make it part of a checkpoint.

    Args:
        batch_size: per process.
        epochs: number of epochs; None never ends.
        finish: function applied to each batch, in this process.
        schedule: sizes and image sequence lengths of the global batches. None: `batch_size` of
            all processes.
        texts: splits the texts of each batch by length: `tokens` is then a tuple of arrays.

    Raises:
        DataError: the data does not exist, has more bad samples than allowed, or is smaller than
            one batch.
        ConfigError: invalid sizes or options.

    Example:
        >>> batches = vlm.data.train_batches(
        ...     experiment.data, model.preprocess, model.tokenizer, batch_size=4, seed=0
        ... )
        >>> batch = next(batches)
        >>> batch["images"].shape, batch["tokens"].shape
        ((4, 16, 16, 3), (4, 12))
    """
    _check_sizes(batch_size, process_index, process_count)
    global_batch = batch_size * process_count
    sizes = schedule or BatchSchedule([BatchSize(global_batch)], seed)

    def lane_batches(seed: int, planned_for: int) -> LaneBatches:
        stream = open_stream(
            config,
            planned_for,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
        )
        if sizes.divisor % stream.lanes:
            raise DataError(
                f"the batch of {sizes.divisor} is no multiple of the {stream.lanes} lanes of the "
                "checkpoint"
            )
        each = stream.lanes // process_count
        own = range(each * process_index, each * (process_index + 1))
        configs = [config, *part_configs(config)]
        transforms = transforms_by_length(configs, preprocess, sizes)
        return LaneBatches(stream, own, sizes, transforms, tokenizer, config)

    if streams(config):
        if reinforced is not None:
            raise ConfigError(
                f"{config.source} is read as a stream, whose examples have no index to look up "
                'stored embeddings: set data.access="random"'
            )
        if epochs is not None:
            raise ConfigError(
                f"{config.source} is read as a stream, whose number of examples is unknown, so "
                "epochs are undefined: set steps or examples"
            )
        if config.cache:
            raise ConfigError(
                "data.cache needs a data set of finite size, not a stream: set it to False"
            )
        if config.hold_out:
            raise ConfigError(
                f"{config.source} is read as a stream, of which no part can be held out: set "
                'data.access="random", or data.hold_out to 0'
            )
        batches, reopen = lane_batches(seed, sizes.divisor), lane_batches
        stream = batches.stream
        about = f"about {stream.examples:,} examples read as a stream"
        description = getattr(stream, "description", about)
        faults, examples = stream.faults, max(1, stream.examples // process_count)
        spare = 2 * stream.shard_length if process_count > 1 else 0
    else:
        source = open_source(config, config.train_split)
        if is_named(config):
            check_workers(source, config)
        order = order_of(source, config)
        description = f"{config.train_split}: {len(source):,} examples"
        if weighted := order.description():
            description += f" weighted by {config.weight_column}; {weighted}"
        read = CachedSource(source, config, preprocess) if config.cache else source

        def indexed_batches(seed: int, planned_for: int) -> TrainBatches:
            return TrainBatches(
                read,
                config,
                preprocess,
                tokenizer,
                batch_size=batch_size,
                seed=seed,
                process_index=process_index,
                process_count=process_count,
                epochs=epochs,
                reinforced=reinforced,
                order=order,
                schedule=schedule,
            )

        batches, reopen = indexed_batches(seed, sizes.divisor), indexed_batches
        faults, spare = getattr(source, "faults", ()), 0
        examples = len(source) + sum(fault.get("samples", 1) for fault in faults)
    bad = BadSamples(
        config.max_bad_share, run_folder, process_index, examples=examples, spare=spare
    )
    bad.take(0, 0, list(faults))  # of shards, known before the first step
    return TrainIterator(
        batches,
        reopen=reopen,
        depends=position_fields(
            config,
            seed,
            global_batch,
            tuple(size.patches for size in sizes.sizes if size.patches is not None),
        ),
        schedule=sizes,
        prefetch=config.prefetch,
        bad=bad,
        finish=finish,
        texts=texts,
        part=(process_index, process_count),
        description=description,
    )


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
    """Iterate once over a split, in order, without augmentation and with first captions.

    Besides `images` and `tokens` a batch has `captions` (list of str), `ids` int32 (b,), the
    example's index in the split, and `mask` bool (b,). The last batches are padded to `batch_size`
    with blank rows (id -1, mask False), so that all processes have the same number of batches.

    Raises:
        DataError: the data does not exist, or an image cannot be read.

    Example:
        >>> batches = vlm.data.eval_batches(
        ...     experiment.data, model.preprocess, model.tokenizer, batch_size=4, split="test"
        ... )
        >>> [int(batch["mask"].sum()) for batch in batches]
        [4, 2]
    """
    _check_sizes(batch_size, process_index, process_count)
    split = split or config.eval_split
    if not split:
        raise DataError("data.eval_split is not set: name the split to evaluate on")
    source = open_source(config, split)
    stride = batch_size * process_count
    end = -(-len(source) // stride) * stride
    for first in range(batch_size * process_index, end, stride):
        ids = np.arange(first, first + batch_size, dtype=np.int32)
        mask = ids < len(source)
        images = preprocess.blank(batch_size)
        captions = [""] * batch_size
        for row in np.flatnonzero(mask):
            example = source[int(ids[row])]
            name = f"the image of example {ids[row]}"
            preprocess.put(images, int(row), preprocess.pixels(example[config.image], name))
            captions[row] = captions_of(example, config)[0]
        yield {
            "images": images,
            "tokens": tokenizer(captions),
            "captions": captions,
            "ids": np.where(mask, ids, -1).astype(np.int32),
            "mask": mask,
        }


def count_examples(config: DataConfig, split: str | None = None) -> int:
    """Count the examples in a split, by default of training; ConfigError for a stream."""
    split = split or config.train_split
    if split == config.train_split and streams(config) and not has_length(config):
        raise ConfigError(
            f"{config.source} is read as a stream, whose number of examples is unknown: set the "
            "length of the run in steps or examples instead of epochs"
        )
    return len(open_source(config, split))


def _pass_seed(seed: int, step: int) -> int:
    """Return the seed of a pass that begins at `step`, so that it has an order of its own."""
    return key(seed, 6, step) & (2**31 - 1) if step else seed


def _check_sizes(batch_size: int, process_index: int, process_count: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size} is empty: make it at least 1 per process")
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process {process_index} of {process_count} does not exist")
