"""How long a run is, and what is due when: all in steps."""

import time

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from vlm.data.pipeline import TrainIterator, count_examples
from vlm.errors import ConfigError
from vlm.sharding import global_batch
from vlm.train.step import Trainer


def length_in_steps(trainer: Trainer, batches: TrainIterator) -> int:
    """The run's length in steps, whichever way the experiment gives it.

    Seconds are measured once, at the start: they become a number of steps that the run keeps, also
    when it is resumed. Compiling and evaluating come on top.

    Raises:
        ConfigError: the experiment gives no length.
    """
    e = trainer.experiment
    if e.steps is not None:
        return e.steps
    if e.examples is not None:
        return max(1, e.examples // e.batch_size)
    if e.epochs is not None:
        return max(1, int(e.epochs * count_examples(e.data) / e.batch_size))
    if e.seconds is None:
        raise ConfigError("the run has no length: set one of steps, epochs, examples, seconds")
    return max(1, int(e.seconds / seconds_per_step(trainer, batches)))


def seconds_per_step(trainer: Trainer, batches: TrainIterator, steps: int = 3) -> float:
    """Time of a step at the full image size, measured on a state that is thrown away."""
    state, position = trainer.init(jnp.int32(1)), batches.get_state()
    batch = global_batch(next(batches), trainer.mesh)
    batches.set_state(position)
    times = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        state, metrics = trainer.step(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - began)
    slowest = max(times[1:])  # the first one compiled
    if jax.process_count() > 1:
        slowest = float(multihost_utils.broadcast_one_to_all(jnp.float32(slowest)))
    return slowest


def is_due(step: int, total: int, share: float | None) -> bool:
    """Whether something that happens every `share` of the run happens after `step`."""
    if share is None:
        return False
    every = max(1, round(total * share))
    return step % every == 0 and step < total
