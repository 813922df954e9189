"""The state of a run in the layout of its next phase: another image size, other frozen parameters.

Position embeddings are resampled, and with them the averages that the optimizer keeps of their
gradients. Parameters that were frozen start with an optimizer state of zeros.
"""

import dataclasses
import functools
from typing import Any

import jax

from vlm.config import Experiment, in_phase
from vlm.errors import ConfigError
from vlm.sharding import path_names
from vlm.training.partition import Params, joined
from vlm.training.resolution import resampled
from vlm.training.step import Trainer, TrainState

_POSITION = ("vision", "position")


def carried_over(old: Trainer, new: Trainer, state: TrainState) -> TrainState:
    """Return the state of a trainer for the trainer of the next phase."""
    if _layout(old) == _layout(new):
        kept = new.from_checkpoint(old.checkpoint_state(state))
        return dataclasses.replace(kept, frozen=state.frozen)

    @functools.partial(jax.jit, out_shardings=new.state_shardings)
    def convert(state: TrainState) -> TrainState:
        params, frozen = new.partition(_resized(new, joined(state.params, state.frozen)))
        ema = state.ema
        if ema is not None:  # parameters that were frozen start their average now
            ema, _ = new.partition(_resized(new, joined(ema, joined(state.params, state.frozen))))
        links = old.checkpoint_state(state).opt_state
        started = dataclasses.replace(state, opt_state=new.optimizer.init(params))
        fresh = new.checkpoint_state(started).opt_state
        kept = {path_names(path): x for path, x in jax.tree_util.tree_leaves_with_path(links)}

        def carry(path, x):
            before = kept.get(path_names(path))
            if before is None or before.shape == x.shape:
                return x if before is None else before
            return _resampled_rows(before, x)

        opt_state = jax.tree_util.tree_map_with_path(carry, fresh)
        state = dataclasses.replace(state, params=params, frozen=frozen, ema=ema)
        return new.from_checkpoint(dataclasses.replace(state, opt_state=opt_state))

    return convert(state)


def check_layouts(experiment: Experiment, trainer: Trainer) -> None:
    """Make the trainers of all phases, and compare the shapes of their parameters.

    Raises:
        ConfigError: a phase of other parameters than position embeddings, or without any that are
            trained; the message names the phase.
    """
    whole = _shapes(trainer)
    for number, phase in enumerate(experiment.phases, 1):
        e = in_phase(experiment, number)
        try:
            other = Trainer(e, trainer.mesh, trainer.rules, trainer.classes, trainer.teacher)
        except ConfigError as error:
            raise ConfigError(f"phase {number} ({phase.begin}): {error}") from None
        shapes = _shapes(other)
        for name in sorted(whole.keys() | shapes.keys()):
            if name != _POSITION and whole.get(name) != shapes.get(name):
                raise ConfigError(
                    f"phase {number} ({phase.begin}) has {'/'.join(name)} of the shape "
                    f"{shapes.get(name)}, and the run {whole.get(name)}: leave out the changes "
                    f"{phase.description()}"
                )


def _resized(new: Trainer, params: Params) -> Params:
    """Return all parameters with the position embeddings of a trainer's image size."""
    table = params["vision"].get("position")
    rows = _shapes(new).get(_POSITION)
    if table is None or rows is None or table.shape == rows:
        return params
    return {**params, "vision": {**params["vision"], "position": resampled(table, rows[0])}}


def _resampled_rows(before: jax.Array, fresh: jax.Array) -> jax.Array:
    """Return an average over position embeddings for another number of them."""
    if before.shape[1:] != fresh.shape[1:]:  # factored over other axes
        return fresh
    rows = before.reshape(len(before), -1)
    # Linear, so that averages of squares stay positive.
    return resampled(rows, len(fresh), "linear").reshape(fresh.shape).astype(before.dtype)


def _shapes(trainer: Trainer) -> dict[tuple[str, ...], tuple[int, ...]]:
    state = trainer.abstract_state
    tree = joined(state.params, state.frozen)
    return {
        path_names(path): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _layout(trainer: Trainer) -> Any:
    """Return the shapes of the parameters, and which of them are trained."""
    state = trainer.abstract_state
    leaves, tree = jax.tree.flatten((state.params, state.frozen))
    return [x.shape for x in leaves], tree
