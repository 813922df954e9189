"""What a run starts from: its tokenizer, the weights of another model, its newest checkpoint."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlm import bundle
from vlm.cluster.processes import first_process_first
from vlm.config import Experiment, to_dict
from vlm.data.pipeline import TrainIterator
from vlm.data.sources import vocabulary_texts
from vlm.errors import ConfigError
from vlm.inputs.tokenizer import Tokenizer, train_bpe
from vlm.models import adapters
from vlm.train.changes import LENGTHS
from vlm.train.checkpoint import Checkpoints
from vlm.train.console import print_on_first_process
from vlm.train.length import length_in_steps
from vlm.train.partition import Params, joined
from vlm.train.run import Run
from vlm.train.step import Trainer, TrainState
from vlm.weights.vocabularies import CLIP_VOCABULARY


def open_tokenizer(run: Run) -> Tokenizer:
    """The run's tokenizer: kept with it, the starting model's, from a file, or the data's own."""
    with first_process_first():
        if not run.tokenizer.exists():
            _first_tokenizer(run.experiment).save(run.tokenizer)
        return Tokenizer.load(run.tokenizer)


def start(
    run: Run, trainer: Trainer, batches: TrainIterator, checkpoints: Checkpoints
) -> TrainState:
    """The state to begin with: of the newest checkpoint, or fresh."""
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        trainer.abstract_state,
        trainer.state_shardings,
    )
    restored = checkpoints.restore(trainer.kept(abstract), report=print_on_first_process)
    if restored is not None:
        state, data_state = restored
        if trainer.experiment.adapter is not None:
            state = _with_base(run, trainer, state)
        batches.set_state(data_state)
        return _with_length(run, trainer, batches, state)
    if run.resumed:
        print_on_first_process("the run has no checkpoint yet: it starts from step 0")
    e = trainer.experiment
    if e.adapter is not None and e.init_from is None:
        raise ConfigError(
            "an adapter is trained beside a model as it is, and without init_from that is at "
            "random: name the model with --init-from"
        )
    state = trainer.init(jnp.int32(length_in_steps(trainer, batches)))
    if e.init_from is None:
        return state
    other = starting_model(e)
    if e.adapter is not None:
        assert other.source is not None  # it was loaded
        run.record_base(other.source, other.identity)
    return from_model(trainer, state, other)


def _with_length(
    run: Run, trainer: Trainer, batches: TrainIterator, state: TrainState
) -> TrainState:
    """The state of a resumed run with the length that the run has by now.

    Raises:
        ConfigError: the run is further than that already.
    """
    changed = any(name in run.changes for name in LENGTHS)
    total = length_in_steps(trainer, batches) if changed else run.last_total()
    step = int(state.step)
    if total is None or total == int(state.total_steps):
        return state
    if total < step:
        raise ConfigError(
            f"the run is at step {step} already, and cannot be {total} steps long: give it more"
        )
    total_steps = jax.make_array_from_callback(
        (), state.total_steps.sharding, lambda _: np.int32(total)
    )
    return dataclasses.replace(state, total_steps=total_steps)


def starting_model(experiment: Experiment) -> bundle.Bundle:
    """The model `init_from`, at the run's size of image, any adapter merged into it."""
    size = experiment.model.vision.image_size
    assert experiment.init_from is not None
    return bundle.load(experiment.init_from, image_size=size).merged()


def from_model(trainer: Trainer, state: TrainState, other: bundle.Bundle) -> TrainState:
    """A fresh state with the weights of another model, or of one of its towers.

    Raises:
        ConfigError: that model is another one than the config's; the message names what differs.
    """
    e = trainer.experiment
    towers = ("vision", "text") if e.init_towers == "both" else (e.init_towers,)
    _check_same(e, other, towers)
    if e.init_towers == "both":
        _check_scale(e, other)
    loaded = _parameters(trainer, other)
    ours = joined(state.params, state.frozen)
    wanted = ours if e.init_towers == "both" else towers
    loaded = {name: loaded[name] for name in wanted if name in loaded}
    places = joined(trainer.state_shardings.params, trainer.state_shardings.frozen)
    ours |= jax.tree.map(_place, loaded, {name: places[name] for name in loaded})
    params, frozen = trainer.divide(ours)
    # The average begins where the parameters do, in buffers of its own: the step donates them all.
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return dataclasses.replace(state, params=params, frozen=frozen, ema=ema)


def _with_base(run: Run, trainer: Trainer, state: TrainState) -> TrainState:
    """A restored state with the model under its adapter, which its checkpoints do not hold.

    Raises:
        CheckpointError: that model has changed since the run began.
    """
    other = starting_model(trainer.experiment)
    run.check_base(other.identity)
    _, frozen = trainer.divide(_parameters(trainer, other))
    frozen = jax.tree.map(_place, frozen, trainer.state_shardings.frozen)
    return dataclasses.replace(state, frozen=frozen)


def _parameters(trainer: Trainer, other: bundle.Bundle) -> Params:
    """The parameters of a model as the run has them: with a fresh adapter if it trains one."""
    e, model = trainer.experiment, other.model
    if e.adapter is not None:
        model = adapters.prepared(model, e.adapter, e.seed)
    return nnx.to_pure_dict(nnx.state(model))


def _place(x: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _check_same(e: Experiment, other: bundle.Bundle, towers: tuple[str, ...]) -> None:
    """Raise a ConfigError that lists every field in which the two models differ."""
    pairs = {"model.embed_dim": (other.config.embed_dim, e.model.embed_dim)}
    for tower in towers:
        theirs, ours = (to_dict(getattr(model, tower)) for model in (other.config, e.model))
        pairs |= {
            f"model.{tower}.{name}": (theirs[name], ours[name])
            for name in ours
            if name not in ("dropout", "patch_dropout")  # of training alone
        }
    if "vision" in towers:
        theirs, ours = other.preprocess.config, e.preprocess
        pairs |= {
            f"preprocess.{name}": (getattr(theirs, name), getattr(ours, name))
            for name in ("mean", "std")
        }
    differ = [f"{k} is {a!r} there and {b!r} here" for k, (a, b) in pairs.items() if a != b]
    if differ:
        raise ConfigError(
            f"init_from {e.init_from!r} is another model than the config's ({'; '.join(differ)}): "
            "make the config agree, or take the tower that does with init_towers"
        )


def _check_scale(e: Experiment, other: bundle.Bundle) -> None:
    """Refuse a scale of the logits that the first step would cut down."""
    cap, scale = e.optimizer.max_scale, other.logit_scale
    if cap is not None and scale > cap * (1 + 1e-5):
        raise ConfigError(
            f"init_from {e.init_from!r} has a scale of {scale:.4g}, which the first step would cut "
            f"to optimizer.max_scale {cap:g}: set that to None, or higher"
        )


def _first_tokenizer(experiment: Experiment) -> Tokenizer:
    if experiment.init_from is not None and experiment.init_towers != "vision":
        return bundle.load(experiment.init_from).tokenizer
    return tokenizer_of(experiment)


def tokenizer_of(experiment: Experiment) -> Tokenizer:
    """The tokenizer of a run from scratch: of the config's file, or learned from the captions."""
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
