"""Initialise a run from another model: its config, tokenizer and weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from vlm import bundle
from vlm.config import Experiment, ModelConfig, PreprocessConfig, ViTConfig, to_dict
from vlm.config.defaults import with_default_model, with_default_rates
from vlm.errors import ConfigError
from vlm.inputs.tokenizer import Tokenizer
from vlm.models import adapters
from vlm.training.partition import Params, joined
from vlm.training.step import Trainer, TrainState
from vlm.weights.registry import describe
from vlm.weights.resolution import at_context_length, at_image_size

# Fields of a tower that do not change the meaning of its weights.
OF_TRAINING = ("dropout", "patch_dropout", "max_patches", "partition")
OF_VOCABULARY = ("pad_id", "bos_id", "eos_id", "zeroed_id")


def resolve(experiment: Experiment) -> Experiment:
    """Fill in unset fields of the experiment from `init_from`, or else with defaults.

    A resolved experiment does not change: a resumed run does not read `init_from` again.

    Raises:
        CheckpointError: there is no such model.
        ConfigError: a size that the model cannot take, or fields that contradict each other.
    """
    return with_default_rates(with_model(experiment))


def with_model(experiment: Experiment) -> Experiment:
    """Fill in the configs of model, preprocessing and tokenizer; reads no weights of `init_from`.

    Raises:
        CheckpointError, ConfigError: as `resolve`.
    """
    e = experiment
    incomplete = None in (e.model, e.preprocess, e.tokenizer)
    if e.init_from is not None and e.init_towers == "both" and incomplete:
        return _described_by_checkpoint(e)
    return with_default_model(e)


def _described_by_checkpoint(e: Experiment) -> Experiment:
    assert e.init_from is not None
    checkpoint, size, length = describe(e.init_from)
    if e.model is not None:
        size, length = e.model.vision.image_size, e.model.text.context_length
    else:
        if e.preprocess is not None:
            size = e.preprocess.image_size
        if e.tokenizer is not None:
            length = e.tokenizer.context_length
        size, length = e.init_image_size or size, e.init_context_length or length
    checkpoint = checkpoint.for_length(length)
    config, preprocess = checkpoint.config, checkpoint.preprocess
    budget = _budget(e, preprocess)
    if budget is None:
        config, preprocess = _with_square_images(config, preprocess)
    config, preprocess = at_image_size(config, preprocess, size)
    if budget is not None:
        if e.init_image_size is not None and preprocess.max_patches is not None:
            budget = preprocess.max_patches
        config, preprocess = _with_any_aspect(e, config, preprocess, budget)
    config, tokenizer = at_context_length(
        config, checkpoint.tokenizer, length, checkpoint.text_positions
    )
    return dataclasses.replace(
        e,
        model=e.model or config,
        preprocess=e.preprocess or preprocess,
        tokenizer=e.tokenizer or tokenizer.config,
        init_image_size=None,
        init_context_length=None,
    )


def _budget(e: Experiment, theirs: PreprocessConfig) -> int | None:
    """Return the maximum number of patches of a NaFlex run; None if it takes square images.

    If the config has neither model nor preprocessing, that of `init_from` decides.
    """
    if e.preprocess is None and e.model is not None:
        return getattr(e.model.vision, "max_patches", None)
    preprocess = e.preprocess or theirs
    return preprocess.max_patches if preprocess.resize == "naflex" else None


def _with_any_aspect(
    e: Experiment, config: ModelConfig, preprocess: PreprocessConfig, budget: int
) -> tuple[ModelConfig, PreprocessConfig]:
    """Convert configs to NaFlex, which has the same parameters as square images."""
    vision = config.vision
    if not isinstance(vision, ViTConfig):
        raise ConfigError(
            f"the vision tower of init_from {e.init_from!r} is a {type(vision).__name__}, and only "
            'a Vision Transformer takes images of any aspect: set another resize than "naflex"'
        )
    preprocess = dataclasses.replace(
        preprocess, resize="naflex", patch_size=vision.patch_size, max_patches=budget
    )
    vision = dataclasses.replace(vision, max_patches=budget)
    return dataclasses.replace(config, vision=vision), preprocess


def _with_square_images(
    config: ModelConfig, preprocess: PreprocessConfig
) -> tuple[ModelConfig, PreprocessConfig]:
    """Convert configs from NaFlex to square images."""
    if preprocess.resize != "naflex":
        return config, preprocess
    vision = dataclasses.replace(config.vision, max_patches=None)
    square = dataclasses.replace(preprocess, resize="squash", patch_size=None, max_patches=None)
    return dataclasses.replace(config, vision=vision), square


def init_tokenizer(e: Experiment) -> Tokenizer:
    """Load the tokenizer of `init_from`, with the rules of the experiment.

    Raises:
        ConfigError: the special tokens differ; the message names them.
    """
    assert e.init_from is not None
    tokenizer = describe(e.init_from)[0].tokenizer
    theirs, ours = tokenizer.config, e.tokenizer
    names = {f"tokenizer.{n}": (getattr(theirs, n), getattr(ours, n)) for n in OF_VOCABULARY}
    _check_equal(e, names)
    return tokenizer.with_rules(ours)


def init_model(e: Experiment) -> bundle.Bundle:
    """Load `init_from` at the run's sizes, with any adapter merged into it."""
    length = None if e.init_towers == "vision" else e.model.text.context_length
    size = e.model.vision.image_size
    assert e.init_from is not None
    return bundle.load(e.init_from, image_size=size, context_length=length).merged()


def from_model(trainer: Trainer, state: TrainState, other: bundle.Bundle) -> TrainState:
    """Copy the weights of another model, or of one of its towers, into a new state.

    Raises:
        ConfigError: the model does not match the config; the message lists the differences.
    """
    e = trainer.experiment
    towers = ("vision", "text") if e.init_towers == "both" else (e.init_towers,)
    _check_same(e, other, towers)
    loaded = parameters(trainer, other)
    ours = joined(state.params, state.frozen)
    wanted = ours if e.init_towers == "both" else towers
    loaded = {name: loaded[name] for name in wanted if name in loaded}
    places = joined(trainer.state_shardings.params, trainer.state_shardings.frozen)
    ours |= jax.tree.map(place, loaded, {name: places[name] for name in loaded})
    params, frozen = trainer.partition(ours)
    return _reset_optimizer(trainer, dataclasses.replace(state, params=params, frozen=frozen))


def with_head(trainer: Trainer, state: TrainState, kernel: Float[np.ndarray, "m d"]) -> TrainState:
    """Set the head's initial weights in a new state."""
    sharding = trainer.state_shardings.params["head"]["kernel"]
    head = {"kernel": place(jnp.asarray(kernel), sharding)}
    return _reset_optimizer(
        trainer, dataclasses.replace(state, params=state.params | {"head": head})
    )


def _reset_optimizer(trainer: Trainer, state: TrainState) -> TrainState:
    """Restart the EMA and the optimizer (with L2-SP's reference) from the state's parameters."""
    # Copies, because the step donates all buffers.
    ema = None if state.ema is None else jax.tree.map(jnp.copy, state.params)
    init = jax.jit(trainer.optimizer.init, out_shardings=trainer.state_shardings.opt_state)
    return dataclasses.replace(state, opt_state=init(state.params), ema=ema)


def parameters(trainer: Trainer, other: bundle.Bundle) -> Params:
    """Return the parameters of a model, with a new adapter if the run trains one."""
    e, model = trainer.experiment, other.model
    if e.adapter is not None:
        model = adapters.prepared(model, e.adapter, e.seed)
    return nnx.to_pure_dict(nnx.state(model))


def place(x: jax.Array | np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _check_same(e: Experiment, other: bundle.Bundle, towers: tuple[str, ...]) -> None:
    """Raise a ConfigError that lists every field in which the two models differ."""
    config, preprocess = other.config, other.preprocess.config
    pairs = {
        f"model.{name}": (getattr(config, name), getattr(e.model, name))
        for name in ("embed_dim", "full_dim")
    }
    for tower in towers:
        theirs, ours = (to_dict(getattr(model, tower)) for model in (config, e.model))
        pairs |= {
            f"model.{tower}.{name}": (theirs.get(name), ours[name])
            for name in ours
            if name not in OF_TRAINING
        }
    if "vision" in towers:
        pairs |= {
            f"preprocess.{name}": (getattr(preprocess, name), getattr(e.preprocess, name))
            for name in ("mean", "std")
        }
    _check_equal(e, pairs)


def _check_equal(e: Experiment, pairs: dict[str, tuple[Any, Any]]) -> None:
    differ = [
        f"{k} is {a!r} in the model and {b!r} in the config"
        for k, (a, b) in pairs.items()
        if a != b
    ]
    if differ:
        raise ConfigError(
            f"init_from {e.init_from!r} does not match the config ({'; '.join(differ)}): "
            "change the config, leave these parts out of it, or take only the tower that matches "
            "with init_towers"
        )
