"""The model that a run starts from: what it says of the run, and its weights in the first state."""

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
from vlm.train.partition import Params, joined
from vlm.train.step import Trainer, TrainState
from vlm.weights.opening import describe
from vlm.weights.resolution import at_context_length, at_image_size

# Fields of a tower that its weights know nothing of.
OF_TRAINING = ("dropout", "patch_dropout", "max_patches")
OF_VOCABULARY = ("pad_id", "bos_id", "eos_id", "zeroed_id")


def resolve(experiment: Experiment) -> Experiment:
    """The experiment in full: what it leaves open is that of `init_from`, or a default.

    A resolved experiment stays as it is: a resumed run does not ask its starting model again.

    Raises:
        CheckpointError: there is no such model.
        ConfigError: a size that it cannot take, or fields that contradict each other.
    """
    return with_default_rates(with_model(experiment))


def with_model(experiment: Experiment) -> Experiment:
    """The experiment with model, pixels and tokens; of a starting model its description is read.

    Raises:
        CheckpointError, ConfigError: as `resolve`.
    """
    e = experiment
    open_parts = None in (e.model, e.preprocess, e.tokenizer)
    if e.init_from is not None and e.init_towers == "both" and open_parts:
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
    """The patches of an image where a run takes any aspect (NaFlex); None: it takes squares.

    Where the config says neither, it is as in the model that the run starts from.
    """
    if e.preprocess is None and e.model is not None:
        return getattr(e.model.vision, "max_patches", None)
    preprocess = e.preprocess or theirs
    return preprocess.max_patches if preprocess.resize == "naflex" else None


def _with_any_aspect(
    e: Experiment, config: ModelConfig, preprocess: PreprocessConfig, budget: int
) -> tuple[ModelConfig, PreprocessConfig]:
    """A model as a NaFlex one, which has the same parameters as one of square images."""
    vision = config.vision
    if not isinstance(vision, ViTConfig):
        raise ConfigError(
            f"the image tower of init_from {e.init_from!r} is a {type(vision).__name__}, and only "
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
    """A NaFlex model as one of square images."""
    if preprocess.resize != "naflex":
        return config, preprocess
    vision = dataclasses.replace(config.vision, max_patches=None)
    square = dataclasses.replace(preprocess, resize="squash", patch_size=None, max_patches=None)
    return dataclasses.replace(config, vision=vision), square


def init_tokenizer(e: Experiment) -> Tokenizer:
    """The vocabulary of the model `init_from`, under the rules of the experiment.

    Raises:
        ConfigError: rules with other special tokens; the message names them.
    """
    assert e.init_from is not None
    tokenizer = describe(e.init_from)[0].tokenizer
    theirs, ours = tokenizer.config, e.tokenizer
    names = {f"tokenizer.{n}": (getattr(theirs, n), getattr(ours, n)) for n in OF_VOCABULARY}
    _check_equal(e, names)
    return tokenizer.with_rules(ours)


def init_model(e: Experiment) -> bundle.Bundle:
    """The model `init_from` at the run's sizes, any adapter merged into it."""
    length = None if e.init_towers == "vision" else e.model.text.context_length
    size = e.model.vision.image_size
    assert e.init_from is not None
    return bundle.load(e.init_from, image_size=size, context_length=length).merged()


def from_model(trainer: Trainer, state: TrainState, other: bundle.Bundle) -> TrainState:
    """A fresh state with the weights of another model, or of one of its towers.

    Raises:
        ConfigError: that model is another one than the config's; the message names what differs.
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
    params, frozen = trainer.divide(ours)
    return begun(trainer, dataclasses.replace(state, params=params, frozen=frozen))


def with_head(trainer: Trainer, state: TrainState, kernel: Float[np.ndarray, "m d"]) -> TrainState:
    """A fresh state whose head starts from these weights."""
    sharding = trainer.state_shardings.params["head"]["kernel"]
    head = {"kernel": place(jnp.asarray(kernel), sharding)}
    return begun(trainer, dataclasses.replace(state, params=state.params | {"head": head}))


def begun(trainer: Trainer, state: TrainState) -> TrainState:
    """A state whose average, and whose pull to the start, begin at its parameters."""
    # In buffers of their own, for the step donates them all.
    ema = None if state.ema is None else jax.tree.map(jnp.copy, state.params)
    begin = jax.jit(trainer.optimizer.init, out_shardings=trainer.state_shardings.opt_state)
    return dataclasses.replace(state, opt_state=begin(state.params), ema=ema)


def parameters(trainer: Trainer, other: bundle.Bundle) -> Params:
    """The parameters of a model as the run has them: with a fresh adapter if it trains one."""
    e, model = trainer.experiment, other.model
    if e.adapter is not None:
        model = adapters.prepared(model, e.adapter, e.seed)
    return nnx.to_pure_dict(nnx.state(model))


def place(x: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _check_same(e: Experiment, other: bundle.Bundle, towers: tuple[str, ...]) -> None:
    """Raise a ConfigError that lists every field in which the two models differ."""
    config, preprocess = other.config, other.preprocess.config
    pairs = {"model.embed_dim": (config.embed_dim, e.model.embed_dim)}
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
    differ = [f"{k} is {a!r} there and {b!r} here" for k, (a, b) in pairs.items() if a != b]
    if differ:
        raise ConfigError(
            f"init_from {e.init_from!r} is another model than the config's ({'; '.join(differ)}): "
            "make the config agree, leave these parts out of it, or take the tower that agrees "
            "with init_towers"
        )
