"""Convert the run length to steps; schedule evaluations and checkpoints."""

import json
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from vlm.cluster.processes import broadcast_text
from vlm.config import DataConfig, Experiment, Phase, in_phase
from vlm.config.batch_sizes import STEPS_IN_SIZE, BatchSize, batch_sizes
from vlm.data.batch_schedule import BatchSchedule
from vlm.data.pipeline import TrainIterator, count_examples
from vlm.data.text_buckets import TextBuckets
from vlm.errors import ConfigError, ShardingError
from vlm.sharding import batch_shard, batch_ways, check_batch
from vlm.training.step import Trainer

Length = Callable[[Trainer, TrainIterator], int]  # chooses the number of steps of a run


def batch_schedule(experiment: Experiment) -> BatchSchedule:
    """Return the sizes of the batches that a run reads, by step."""
    e = experiment
    sizes = batch_sizes(e) if e.selection is None else [BatchSize(e.super_batch_size)]
    return BatchSchedule(sizes, e.seed)


def text_buckets(experiment: Experiment, mesh: Mesh) -> TextBuckets | None:
    """Return the splitter of texts by length; None if all texts have the whole context."""
    e = experiment
    if not e.text_lengths:
        return None
    text, (_, shards) = e.model.text, batch_shard(mesh)
    parts = e.batch_size // (e.micro_batch_size or e.batch_size)
    lengths = (*sorted(set(e.text_lengths)), text.context_length)
    return TextBuckets(lengths, text, devices=batch_ways(mesh) // shards, parts=parts)


def check_batch_sizes(experiment: Experiment, mesh: Mesh | AbstractMesh) -> None:
    """Raise a ShardingError unless all batches and micro-batches divide over the mesh."""
    e = experiment
    check_batch(e.batch_size, mesh)
    check_batch(e.micro_batch_size or e.batch_size, mesh, "micro_batch_size")
    parts = e.batch_size // (e.micro_batch_size or e.batch_size)
    ways = parts * batch_ways(mesh)
    for pairs, length in batch_sizes(e):
        if pairs % ways:
            of = f" of {parts} micro-batches" if parts > 1 else ""
            raise ShardingError(
                f"batch_size {e.batch_size} is {pairs} pairs at the sequence length {length}, "
                f"which do not divide over the {ways // parts} devices of mesh axes data x fsdp"
                f"{of}: make batch_size a multiple of {STEPS_IN_SIZE * ways}"
            )


def length_in_steps(
    trainer: Trainer, batches: TrainIterator, data: DataConfig | None = None
) -> int:
    """Return the run's length in steps, from its steps, examples, epochs or seconds.

    Epochs are of `data`, by default that of the trainer's experiment. Seconds are converted with
    the step time measured at the start. A resumed run keeps that number of steps. Compilation and
    evaluation take additional time.

    Raises:
        ConfigError: the experiment gives no length.
    """
    e = trainer.experiment
    if e.steps is not None:
        return e.steps
    examples = e.examples
    if e.epochs is not None:
        examples = int(e.epochs * count_examples(data or e.data))
    if examples is not None:  # earlier steps may have had another batch size
        return max(1, steps_to(examples, e, batches.step, batches.samples))
    if e.seconds is None:
        raise ConfigError("the run has no length: set one of steps, epochs, examples, seconds")
    times = step_times(trainer, batches, e.seconds / 10)
    return max(1, int(e.seconds / max(times)))


def phase_starts(experiment: Experiment, total: int, step: int = 0, samples: int = 0) -> list[int]:
    """Return the step at which each of `experiment.phases` begins.

    Args:
        experiment: that of the current phase, with the phases after it.
        total: length of the run in steps.
        step: step of the run, which no phase begins before.
        samples: pairs seen before that step.
    """
    return _starts(experiment.phases, _batch_sizes(experiment), total, step, samples)


def _batch_sizes(experiment: Experiment) -> list[int]:
    """Return the batch size of each phase, from the current one on."""
    count = len(experiment.phases) + 1
    return [in_phase(experiment, number).super_batch_size for number in range(count)]


def _starts(
    phases: tuple[Phase, ...], batch_sizes: list[int], total: int, step: int, samples: int
) -> list[int]:
    starts = []
    for phase, batch_size in zip(phases, batch_sizes, strict=False):
        if phase.step is not None:
            start = phase.step
        elif phase.fraction is not None:
            start = round(phase.fraction * total)
        else:
            assert phase.examples is not None
            start = step + math.ceil((phase.examples - samples) / batch_size)
        starts.append(start := max(start, step))
        samples, step = samples + (start - step) * batch_size, start
    return starts


def check_starts(experiment: Experiment, starts: list[int], total: int, step: int) -> None:
    """Raise a ConfigError unless the phases begin one after the other within the run."""
    before = 0
    for phase, start in zip(experiment.phases, starts, strict=True):
        if start >= total:
            raise ConfigError(
                f"the phase of {phase.begin} ({phase.description()}) begins at step {start:,}, and "
                f"the run has {total:,} steps: make the run longer, or the phase earlier"
            )
        if start == before and start != (step or None):  # a resumed run catches up with its phases
            raise ConfigError(
                f"the phase of {phase.begin} ({phase.description()}) begins at step {start:,}, "
                "where the one before it begins: leave out one of them, or make the run longer"
            )
        before = start


def steps_to(examples: int, e: Experiment, step: int, samples: int) -> int:
    """Return the most steps of a run that sees at most so many pairs."""
    if not e.phases:
        return step + batch_schedule(e).steps_of(examples - samples, step)
    sizes = _batch_sizes(e)

    def seen(total: int) -> int:
        place, count = step, samples
        ends = [*_starts(e.phases, sizes, total, step, samples), total]
        for end, size in zip(ends, sizes, strict=True):
            count += max(0, min(end, total) - place) * size
            place = max(place, min(end, total))
        return count

    low, high = step, step + max(0, examples - samples)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if seen(middle) <= examples else (low, middle - 1)
    return low


def step_times(
    trainer: Trainer, batches: TrainIterator, limit: float, steps: int = 3
) -> list[float]:
    """Measure the seconds of steps at the full image size, including their wait for data.

    Trains a temporary state. Batches prefetched during compilation are consumed first. Takes little
    more than `limit` seconds plus compilation and one step.
    """
    state, position = trainer.init(jnp.int32(1)), batches.get_state()
    for _ in batches.schedule.sizes:
        state, metrics = trainer.step(state, trainer.place(next(batches)))
        jax.block_until_ready(metrics)  # compiled
    data, began, drawn = trainer.experiment.data, time.monotonic(), 0
    while drawn < data.prefetch * max(1, data.workers) and time.monotonic() - began < limit:
        next(batches)
        drawn += 1
    times: list[float] = []
    began = time.monotonic()
    while len(times) < steps and _all_continue(not times or time.monotonic() - began < limit):
        start = time.monotonic()
        state, metrics = trainer.step(state, trainer.place(next(batches)))
        jax.block_until_ready(metrics)
        times.append(time.monotonic() - start)
    batches.set_state(position)
    return json.loads(broadcast_text(json.dumps(times)))


def _all_continue(decision: bool) -> bool:
    """Return the decision of process 0 in all processes, since a step needs them all."""
    return broadcast_text("continue" if decision else "") == "continue"


def is_scheduled(step: int, total: int, share: float | None) -> bool:
    """Whether an event that recurs after each fraction `share` of the run follows `step`."""
    if not share:
        return False
    every = max(1, round(total * share))
    return step % every == 0 and step < total


class CheckpointSchedule:
    """Schedule of checkpoints: every fraction of the run, and every so many minutes.

    All processes must agree, and their clocks differ. So they use the clock of process 0, read at
    steps agreed beforehand: each time half the estimated number of steps to the next checkpoint.
    """

    def __init__(self, experiment: Experiment, first_step: int, total: int):
        self._share, self._total = experiment.checkpoint_every, total
        minutes = experiment.checkpoint_minutes
        self._seconds = None if minutes is None else 60 * minutes
        self._last = self._began = time.monotonic()
        self._first, self._ask_next = first_step, first_step + 1

    def is_scheduled(self, step: int, writing: bool) -> bool:
        """Whether to save after `step`; only by fraction while a checkpoint is being written."""
        scheduled = is_scheduled(step, self._total, self._share)
        if self._seconds is not None and step >= self._ask_next and step < self._total:
            now = time.monotonic()
            # The mean over the whole run, and no further ahead than the steps so far: the first
            # steps may only be dispatched here, and computed later.
            done = step - self._first
            rate = done / max(now - self._began, 1e-9)
            left = self._seconds - (now - self._last)
            wait = 1 if writing else min(done, int(left * rate / 2))
            answer = "save" if left <= 0 and not writing else str(max(1, wait))
            answer = broadcast_text(answer)
            scheduled = scheduled or answer == "save"
            self._ask_next = step + (1 if answer == "save" else int(answer))
        if scheduled:
            self._last = time.monotonic()
        return scheduled
