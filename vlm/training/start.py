"""Initial state of a run: from its newest checkpoint, from another model, or random."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm.cluster.processes import first_process_first
from vlm.config import Experiment
from vlm.data.pipeline import TrainIterator
from vlm.data.sources import vocabulary_texts
from vlm.errors import ConfigError
from vlm.inputs.tokenizer import RULES_FILE, Tokenizer, train_bpe
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
        if not (run.tokenizer / RULES_FILE).exists():
            e = run.experiment
            of_model = e.init_from is not None and e.init_towers != "vision"
            (init_tokenizer if of_model else tokenizer_of)(e).save(run.tokenizer)
        tokenizer = Tokenizer.load(run.tokenizer)
    if "tokenizer_file" in run.changes:
        _check_vocabulary(run, tokenizer)
    return tokenizer


def _check_vocabulary(run: Run, tokenizer: Tokenizer) -> None:
    """Raise a ConfigError unless a changed tokenizer_file has the run's vocabulary."""
    if tokenizer_of(run.experiment).fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"tokenizer_file {run.experiment.tokenizer_file} has another vocabulary than the run, "
            f"whose tokens the model has learned: leave it out, for {run.tokenizer} is used"
        )


class OtherPhase(Exception):
    """The newest checkpoint is of a phase that began at the last of the steps `starts`."""

    def __init__(self, starts: list[int]):
        super().__init__(f"the checkpoint is of phase {len(starts)}")
        self.starts = starts


def start(
    run: Run,
    trainer: Trainer,
    batches: TrainIterator,
    checkpoints: Checkpoints,
    classes: Classes | None = None,
    length: Length = length_in_steps,
    phase: int = 0,
    check: Callable[[], None] = lambda: None,
    total: int | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """Restore the state of the newest checkpoint, or initialise a new one of `length` steps.

    Returns it with the data state of the checkpoint, which is empty without one. The phase of both
    must be `phase`, that of the trainer and the batches. `check` is called before the state of a
    checkpoint is read. `total` is the number of steps of a run that returns to a checkpoint.

    Raises:
        OtherPhase: the newest checkpoint is of another phase.
    """
    abstract = jax.tree.map(placed, trainer.abstract_state, trainer.state_shardings)
    e = trainer.experiment
    saved = trainer.checkpoint_state(abstract)
    older = dataclasses.replace(saved, opt_state=abstract.opt_state)

    def accepts(data_state: dict[str, Any]) -> bool:
        if len(phase_starts_of(data_state)) != phase:
            return False
        check()
        return True

    restored = checkpoints.restore(saved, older, accepts)
    if restored is not None:
        state, data_state = restored
        if state is None:
            raise OtherPhase(phase_starts_of(data_state))
        if isinstance(state.opt_state, dict):
            state = trainer.from_checkpoint(state)
        if e.adapter is not None:
            state = _with_base(run, trainer, state)
        if e.objective == "classification":
            assert classes is not None
            run.check_classes(classes.names)
        _resume_data(run, batches, data_state)
        return _with_length(run, trainer, batches, state, total), data_state
    if phase:  # its checkpoint was deleted
        raise OtherPhase([])
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
    return state, {}


def phase_starts_of(data_state: dict[str, Any]) -> list[int]:
    """Return the first steps of the phases that had begun when a checkpoint was written."""
    return data_state.get("phase_starts", [])


def _resume_data(run: Run, batches: TrainIterator, data_state: dict[str, Any]) -> None:
    """Set the position of the data, and log what changed fields do to it.

    Raises:
        ConfigError: the batch size changed, and the checkpoint does not have the number of samples.
    """
    if "batch_size" in run.changes and "samples" not in data_state:
        raise ConfigError(
            "the checkpoint was written by an older version, without its number of samples, so "
            "--batch-size cannot change yet: resume the run unchanged until its next checkpoint"
        )
    batches.resume(data_state)
    if batches.position_change:
        log.info(f"the data {batches.position_change}")


def _with_length(
    run: Run, trainer: Trainer, batches: TrainIterator, state: TrainState, total: int | None
) -> TrainState:
    """Set the total steps of a resumed run, if its length or the steps of its length changed.

    If `total` is given, set that.

    Raises:
        ConfigError: the run is already past the new length.
    """
    e = run.experiment
    changed = any(name in run.changes for name in LENGTHS)
    changed |= run.edited and e.seconds is None  # whose steps depend on the speed
    sizes = ("batch_size", "selection", "phases")
    if any(name.startswith(sizes) for name in run.changes):  # so many examples are other steps
        changed |= e.examples is not None or e.epochs is not None
    if total is None:
        total = length_in_steps(trainer, batches, e.data) if changed else run.last_total()
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
