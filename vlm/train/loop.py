"""The training loop: from an experiment to a run folder with a model that can be used."""

import os
import signal
import time

import jax
import jax.numpy as jnp
from etils import epath
from rich.table import Table

from vlm.bundle import Bundle
from vlm.config import Experiment
from vlm.data.pipeline import count_examples, train_batches
from vlm.data.sources import credits, vocabulary_texts
from vlm.errors import ConfigError
from vlm.sharding import check_batch, global_batch, make_mesh, placement
from vlm.tokenizer import Tokenizer, train_bpe
from vlm.train.checkpoint import Checkpoints
from vlm.train.held_out import HeldOut, finish
from vlm.train.logs import Logs, console
from vlm.train.run import Run
from vlm.train.step import Trainer, TrainState


def train(
    experiment: Experiment | None = None, *, resume: str | os.PathLike | None = None
) -> epath.Path:
    """Train `experiment` in a new run folder, or go on with the run in `resume`.

    Returns the run folder. SIGINT and SIGTERM save a checkpoint and leave; a resumed run ends as if
    it had not been left.

    Raises:
        VlmError: whatever a user can mend, from a wrong batch size to a full disk.
    """
    run = Run.create(experiment) if resume is None else Run.open(resume)
    experiment = run.experiment
    mesh = make_mesh(experiment.mesh)
    check_batch(experiment.batch_size, mesh)
    check_batch(experiment.micro_batch_size or experiment.batch_size, mesh, "micro_batch_size")
    processes = jax.process_count()

    tokenizer = the_tokenizer(run)
    trainer = Trainer(experiment, mesh)
    batches = train_batches(
        experiment.data,
        trainer.preprocess,
        tokenizer,
        batch_size=experiment.batch_size // processes,
        seed=experiment.seed,
        process_index=jax.process_index(),
        process_count=processes,
    )
    held = HeldOut(experiment, trainer, tokenizer) if experiment.data.eval_split else None

    with Checkpoints(run.checkpoints, experiment.keep_checkpoints) as checkpoints:
        state = start(trainer, batches, checkpoints)
        step, total = int(state.step), int(state.total_steps)
        with Logs(run, first_step=step, total_steps=total) as logs, Interrupted() as interrupted:
            if step == 0:
                logs.say(f"run folder {run.folder}")
                console.print(placement_table(state)) if jax.process_index() == 0 else None
            while step < total and not interrupted.at(step):
                waited = time.perf_counter()
                batch = global_batch(next(batches), mesh)
                waited = time.perf_counter() - waited
                state, metrics = trainer.step(state, batch)
                step += 1
                logs.step(step, metrics, waited)

                if held and due(step, total, experiment.eval_every):
                    logs.flush()
                    zero_shot, retrieval = held.measure(*held.embed(state))
                    values = {f"eval/{k}": float(v) for k, v in (zero_shot | retrieval).items()}
                    logs.write({"step": step, **values})
                    logs.say(f"step {step}  held-out top-1 {zero_shot['top1']}")
                    logs.restart_clock()
                if due(step, total, experiment.checkpoint_every) or step == total:
                    logs.flush()
                    checkpoints.save(step, state, batches.get_state())
            if step < total:
                logs.flush()
                checkpoints.save(step, state, batches.get_state())
                checkpoints.wait()
                logs.say(f"left at step {step}; go on with `vlm train --resume {run.folder}`")
                batches.close()
                return run.folder
        batches.close()
        checkpoints.wait()

    bundle = Bundle(trainer.model(state), trainer.preprocess, tokenizer, name=experiment.name)
    bundle.save(run.bundle)
    if held:
        report = finish(run, held, state, bundle, credits(experiment.data))
        if jax.process_index() == 0:
            console.print(report)
            console.print(f"report {run.folder / 'report.html'}", highlight=False)
    return run.folder


def start(trainer: Trainer, batches, checkpoints: Checkpoints) -> TrainState:
    """The state to begin with: of the newest checkpoint, or fresh."""
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        trainer.abstract_state,
        trainer.state_shardings,
    )
    restored = checkpoints.restore(abstract, say=console.print)
    if restored is None:
        return trainer.init(jnp.int32(length_in_steps(trainer, batches)))
    state, data_state = restored
    batches.set_state(data_state)
    return state


def length_in_steps(trainer: Trainer, batches) -> int:
    """The run's length in steps, whichever way the experiment gives it."""
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


def seconds_per_step(trainer: Trainer, batches, steps: int = 3) -> float:
    """Time of a step, measured on a state that is thrown away."""
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
        from jax.experimental import multihost_utils

        slowest = float(multihost_utils.broadcast_one_to_all(jnp.float32(slowest)))
    return slowest


def the_tokenizer(run: Run) -> Tokenizer:
    """The run's tokenizer: kept with it, from a file, or learned from the training captions."""
    if run.tokenizer.exists():
        return Tokenizer.load(run.tokenizer)
    experiment = run.experiment
    if experiment.tokenizer_file is not None:
        tokenizer = Tokenizer.from_file(experiment.tokenizer_file, experiment.tokenizer)
    else:
        learned = train_bpe(
            vocabulary_texts(experiment.data),
            experiment.model.text.vocab_size,
            experiment.tokenizer.context_length,
            lowercase=experiment.tokenizer.lowercase,
        )
        tokenizer = learned
    if jax.process_index() == 0:
        tokenizer.save(run.tokenizer)
    return tokenizer


def due(step: int, total: int, share: float | None) -> bool:
    """Whether something that happens every `share` of the run happens after `step`."""
    if share is None:
        return False
    every = max(1, round(total * share))
    return step % every == 0 and step < total


def placement_table(state: TrainState) -> Table:
    """Where the parameters live."""
    table = Table("parameters", "spec", "elements", "bytes per device")
    for group, spec, elements, size in placement(state.params):
        table.add_row(group, spec, f"{elements:,}", f"{size:,}")
    return table


class Interrupted:
    """Whether a signal asked the run to leave. A second Ctrl-C stops at once."""

    def __enter__(self) -> "Interrupted":
        self._asked = False
        self._previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True

    def at(self, step: int) -> bool:
        """All processes agree on the step after which they leave."""
        if jax.process_count() == 1:
            return self._asked
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
