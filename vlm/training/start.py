"""Initial state of a run: from its newest checkpoint, from another model, or random."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vlm.cluster.processes import first_process_first
from vlm.config import Experiment
from vlm.data.pipeline import TrainIterator
from vlm.data.sources import vocabulary_texts
from vlm.errors import ConfigError
from vlm.inputs.tokenizer import Tokenizer, train_bpe
from vlm.sharding import placed
from vlm.training.changes import LENGTHS
from vlm.training.checkpoint import Checkpoints
from vlm.training.console import log
from vlm.training.init_from import (
    from_model,
    init_model,
    init_tokenizer,
    parameters,
    place,
    with_head,
)
from vlm.training.run import Run
from vlm.training.schedule import Length, length_in_steps
from vlm.training.step import Trainer, TrainState
from vlm.training.supervision import Classes
from vlm.weights.vocabularies import CLIP_VOCABULARY


def open_tokenizer(run: Run) -> Tokenizer:
    """Load the run's tokenizer; a new run takes that of `init_from`, a file, or trains one."""
    with first_process_first():
        if not run.tokenizer.exists():
            e = run.experiment
            of_model = e.init_from is not None and e.init_towers != "vision"
            (init_tokenizer if of_model else tokenizer_of)(e).save(run.tokenizer)
        return Tokenizer.load(run.tokenizer)


def start(
    run: Run,
    trainer: Trainer,
    batches: TrainIterator,
    checkpoints: Checkpoints,
    classes: Classes | None = None,
    length: Length = length_in_steps,
) -> TrainState:
    """Restore the state of the newest checkpoint, or initialise a new one of `length` steps."""
    abstract = jax.tree.map(placed, trainer.abstract_state, trainer.state_shardings)
    e = trainer.experiment
    restored = checkpoints.restore(trainer.checkpoint_state(abstract))
    if restored is not None:
        state, data_state = restored
        if e.adapter is not None:
            state = _with_base(run, trainer, state)
        if e.objective == "classification":
            assert classes is not None
            run.check_classes(classes.names)
        batches.set_state(data_state)
        return _with_length(run, trainer, batches, state)
    if run.resumed:
        log.info("the run has no checkpoint yet: it starts from step 0")
    if e.adapter is not None and e.init_from is None:
        raise ConfigError(
            "an adapter is trained on top of a pretrained model, and without init_from the model "
            "is random: name the model with --init-from"
        )
    state = trainer.init(jnp.int32(length(trainer, batches)))
    if e.init_from is not None:
        other = init_model(e)
        if e.adapter is not None:
            assert other.source is not None  # it was loaded
            run.record_base(other.source, other.identity)
        state = from_model(trainer, state, other)
    if e.objective == "classification":
        assert classes is not None
        run.record_classes(classes.names)
        state = with_head(trainer, state, classes.embed(trainer, state))
    return state


def _with_length(
    run: Run, trainer: Trainer, batches: TrainIterator, state: TrainState
) -> TrainState:
    """Set the total steps of a resumed run, if its length changed.

    Raises:
        ConfigError: the run is already past the new length.
    """
    changed = any(name in run.changes for name in LENGTHS)
    total = length_in_steps(trainer, batches) if changed else run.last_total()
    step = int(state.step)
    if total is None or total == int(state.total_steps):
        return state
    if total < step:
        raise ConfigError(
            f"the run is at step {step} already, and cannot be {total} steps long: choose more"
        )
    return dataclasses.replace(
        state, total_steps=place(np.asarray(total, np.int32), state.total_steps.sharding)
    )


def _with_base(run: Run, trainer: Trainer, state: TrainState) -> TrainState:
    """Add the base model of the adapter to a restored state: checkpoints hold only the adapter.

    Raises:
        CheckpointError: that model has changed since the run began.
    """
    other = init_model(trainer.experiment)
    run.check_base(other.identity)
    _, frozen = trainer.partition(parameters(trainer, other))
    frozen = jax.tree.map(place, frozen, trainer.state_shardings.frozen)
    return dataclasses.replace(state, frozen=frozen)


def tokenizer_of(experiment: Experiment) -> Tokenizer:
    """Make the tokenizer of a run from scratch: of the config's file, or trained on captions."""
    e = experiment
    if e.tokenizer_file is not None:
        path = CLIP_VOCABULARY if e.tokenizer_file == "clip" else e.tokenizer_file
        return Tokenizer.from_file(path, e.tokenizer)
    return train_bpe(
        vocabulary_texts(e.data),
        e.model.text.vocab_size,
        e.tokenizer.context_length,
        lowercase=e.tokenizer.lowercase,
    )
