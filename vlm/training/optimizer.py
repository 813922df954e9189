"""Update rules and schedules over a tree of parameters.

A schedule is a function of the run's progress in [0, 1], so that a run's length may be given in
steps, epochs, examples or seconds and lives in the state, not in the compiled step.
"""

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from vlm.config import Code, OptimizerConfig
from vlm.errors import ConfigError, check_choice
from vlm.sharding import is_stacked, path_names
from vlm.training.parameter_masks import Factors, first_match, name_of

# Parameters with weight decay: in open_clip all that have two axes or more, in big_vision only
# kernels (`wd_mults` of its `optax.py`). Never norms, biases, scale.
KERNELS = {"kernel", "kernels"}  # a stem has a list of kernels
DECAYED = {"open_clip": KERNELS | {"embedding", "position", "probe"}, "big_vision": KERNELS}
FACTORS = {("lora", "a"), ("lora", "b")}  # of adapters: matrices by both rules


def learning_rate(
    config: OptimizerConfig, progress: Float[Array, ""], total_steps: Any = None
) -> Float[Array, ""]:
    """Compute the learning rate after a fraction `progress` of the run.

    `total_steps` is the length of the run, which a timescale needs.

    Linear warm-up from zero, then one of: half a cosine (arXiv:1608.03983); the reciprocal square
    root of the progress and a cooldown (arXiv:2106.04560); a plateau and a cooldown
    (warmup-stable-decay, arXiv:2405.18392), all three down to `end_learning_rate`; a plateau. A
    schedule of the user is the factor of the peak. A whole optimizer of the user has its own rate,
    so its updates are applied as they are: 1.

    Raises:
        ConfigError: a schedule of the user fails, or returns no scalar.
    """
    if config.transformation is not None:
        return jnp.float32(1)
    if isinstance(config.schedule, Code):
        return jnp.float32(config.learning_rate) * _own_factor(config.schedule, progress)
    warmup, cooldown = config.warmup, config.cooldown
    if config.timescale is not None:
        assert total_steps is not None
        warmup = config.timescale / total_steps
    has_warmup = config.timescale is not None or config.warmup > 0
    rise = jnp.minimum(1.0, progress / warmup) if has_warmup else jnp.ones(())
    fall = jnp.clip((1 - progress) / cooldown, 0, 1) if cooldown > 0 else jnp.ones(())
    peak = jnp.float32(config.learning_rate)
    match config.schedule:
        case "cosine":
            past = jnp.clip((progress - warmup) / (1 - warmup), 0, 1)
            fall = 0.5 * (1 + jnp.cos(jnp.pi * past))
        case "rsqrt":
            start = warmup if config.timescale is not None else max(warmup, 1e-3)
            peak = peak * jnp.sqrt(start / jnp.maximum(progress, start))
        case "wsd":
            pass
        case "constant":
            fall = jnp.ones(())
        case _:
            assert_never(config.schedule)
    return rise * (config.end_learning_rate + (peak - config.end_learning_rate) * fall)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Make the optimizer, without the learning rate: a step subtracts rate * updates.

    A chain of clipping by the global norm, the update rule, rates by tower and layer, and decoupled
    weight decay. With `weight_decay_rule` "open_clip" a step subtracts learning rate * weight_decay
    of a parameter, as PyTorch's AdamW does, and rates by tower and layer scale that too. With
    "big_vision" it subtracts weight_decay * (learning rate / its peak), independent of the rates.

    Raises:
        ConfigError: code of the user makes no `optax.GradientTransformation`.

    Example:
        >>> optimizer = vlm.training.make_optimizer(vlm.OptimizerConfig(name="adamw"))
        >>> params = {"kernel": jnp.ones((2, 2))}
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> jax.tree.map(jnp.shape, updates)
        {'kernel': (2, 2)}
    """
    if config.transformation is not None:
        return optax.chain(_own(config.transformation, "transformation"), optax.scale(-1.0))
    parts = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    parts.append(_rule(config))
    rates = []
    if config.layer_decay != 1.0:
        rates.append(_scale_by_layer(config.layer_decay))
    if (config.vision_rate, config.text_rate) != (1.0, 1.0):
        rates.append(_scale_by_tower({"vision": config.vision_rate, "text": config.text_rate}))
    if config.rates:
        rates.append(_scale_by_name(config.rates))
    decays = []
    by_peak = config.weight_decay_rule == "big_vision"
    per_step = config.learning_rate if by_peak else 1.0  # the step multiplies the rate in
    if config.l2_sp:  # replaces decay towards zero
        decays.append(_pull_to_start(config.l2_sp / per_step))
    elif config.weight_decay:
        mask = functools.partial(decay_mask, rule=config.weight_decay_rule)
        strength = config.weight_decay / per_step
        if config.decays:
            decays.append(_decay_by_name(strength, config.decays, mask))
        else:
            decays.append(optax.add_decayed_weights(strength, mask=mask))
    return optax.chain(*parts, *rates, *decays) if by_peak else optax.chain(*parts, *decays, *rates)


def _pull_to_start(share: float) -> optax.GradientTransformation:
    """Decay towards the initial parameters by the factor `share` (L2-SP, arXiv:1802.01483).

    Decoupled from the update rule, as in AdamW. The initial parameters are part of the state and of
    every checkpoint. Scale and bias of the logits are not decayed.
    """

    def init(params):
        return jax.tree.map(jnp.copy, _towers(params))

    def update(updates, state, params=None):
        pulled = jax.tree.map(
            lambda u, p, s: u + share * (p - s), _towers(updates), _towers(params), state
        )
        return {**updates, **pulled}, state

    return optax.GradientTransformation(init, update)


def _towers(params: Any) -> dict[str, Any]:
    return {name: tree for name, tree in params.items() if not name.startswith("logit_")}


def own_learning_rate(config: OptimizerConfig, opt_state: Any) -> Float[Array, ""] | None:
    """Return the rate that an optimizer of the user keeps by `optax.inject_hyperparams`, if any."""
    if config.transformation is None:
        return None
    found = [x for _, x in optax.tree.get_all_with_path(opt_state, "learning_rate")]
    rates = [x for x in found if isinstance(x, jax.Array) and x.ndim == 0]
    return rates[0] if len(rates) == 1 else None


def _own(code: Code, field: str) -> optax.GradientTransformation:
    """Load a transformation of the user, or call the function that makes it."""
    found = code.load(f"optimizer.{field}")
    if callable(found) and not isinstance(found, optax.GradientTransformation):
        try:
            found = found()
        except Exception as error:
            raise ConfigError(
                f"optimizer.{field} {code} failed with {type(error).__name__}: {error}: it is "
                "called without arguments, and returns an optax.GradientTransformation"
            ) from error
    if not isinstance(found, optax.GradientTransformation):
        raise ConfigError(
            f"optimizer.{field} {code} is a {type(found).__name__}: give an "
            "optax.GradientTransformation such as optax.adamw(1e-3), or a function that makes it"
        )
    return found


def _own_factor(code: Code, progress: Float[Array, ""]) -> Float[Array, ""]:
    try:
        factor = code.load("optimizer.schedule")(progress)
    except Exception as error:
        raise ConfigError(
            f"optimizer.schedule {code} failed with {type(error).__name__}: {error}: it takes the "
            "fraction of the run, and returns a factor of learning_rate"
        ) from error
    if jnp.shape(factor) != ():
        raise ConfigError(
            f"optimizer.schedule {code} returned an array {jnp.shape(factor)}: return a scalar"
        )
    return jnp.asarray(factor, jnp.float32)


def _rule(config: OptimizerConfig) -> optax.GradientTransformation:
    if isinstance(config.name, Code):
        return _own(config.name, "name")
    match config.name:
        case "adamw":  # arXiv:1711.05101
            return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
        case "lion":  # arXiv:2302.06675
            return optax.scale_by_lion(b1=config.b1, b2=config.b2)
        case "adafactor":  # arXiv:1804.04235 in the form of arXiv:2106.04560
            momentum = optax.ema(config.b1, debias=False, accumulator_dtype=jnp.bfloat16)
            return optax.chain(_factored_rms(config.b2), momentum)
        case "muon":
            return _muon(config)
        case _:
            assert_never(config.name)


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    # Muon orthogonalises the momentum of the blocks' matrices (Jordan et al., 2024,
    # kellerjordan.github.io/posts/muon); Adam updates the rest. Both use optax's Nesterov momentum.
    # Muon's updates are scaled to the root-mean-square of Adam's (arXiv:2502.16982), so one
    # learning rate suits both.
    return optax.contrib.muon(
        learning_rate=-1.0,  # the step subtracts the update, so undo the sign here
        adam_b1=config.b1,
        adam_b2=config.b2,
        eps=config.eps,
        muon_weight_dimension_numbers=functools.partial(
            jax.tree_util.tree_map_with_path, _matrix_axes
        ),
        consistent_rms=0.2,
    )


def _factored_rms(cap: float) -> optax.GradientTransformation:
    """Adafactor's division by the root-mean-square of gradients, factored into rows and columns.

    The decay of the second moment rises with the steps up to `cap`: without a cap, a long run would
    average over tens of thousands of steps. Each layer of a stack is factored on its own.
    """

    def decay(step, exponent):
        t = jnp.asarray(step, jnp.float32) + 1
        return jnp.minimum(cap, 1 - t**-exponent)

    rule = optax.scale_by_factored_rms(
        decay_rate=0.8, min_dim_size_to_factor=32, decay_rate_fn=decay
    )

    def parts(params: Any) -> optax.GradientTransformationExtraArgs:
        """Return the rule for each stack, which has a depth of its own, and for the rest."""
        stacks: dict[str, set[str]] = {"vision": set(), "text": set()}
        for path, _ in jax.tree_util.tree_leaves_with_path(params):
            if is_stacked(names := path_names(path)):
                stacks[names[0]].add(_stack(names))

        def label(path, _):
            names = path_names(path)
            if not is_stacked(names):
                return "alone"
            return names[0] if len(stacks[names[0]]) == 1 else _stack(names)

        labels = jax.tree_util.tree_map_with_path(label, params)
        rules: dict[Hashable, optax.GradientTransformation] = {"alone": rule}
        for name in {"vision", "text", *jax.tree.leaves(labels)} - {"alone"}:
            rules[name] = _by_layer(rule)
        return optax.partition(rules, labels)

    def update(updates, state, params=None):
        return parts(updates).update(updates, state, params)

    return optax.GradientTransformation(lambda params: parts(params).init(params), update)


def _stack(names: tuple[str, ...]) -> str:
    """Return the name of the stack of blocks that a parameter is in."""
    return "/".join(names[: names.index("blocks") + 1])


def _by_layer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Apply `rule` to each layer of arrays with a leading axis of layers."""

    def init(params):
        return jax.vmap(rule.init)(params) if jax.tree.leaves(params) else optax.EmptyState()

    def update(updates, state, params=None):
        if not jax.tree.leaves(updates):  # the tower is locked, or has no stack
            return updates, state
        return jax.vmap(rule.update)(updates, state, params)

    return optax.GradientTransformation(init, update)


def _matrix_axes(path: tuple, x: Any) -> optax.contrib.MuonDimensionNumbers | None:
    """Return the axes of a hidden matrix; None for other parameters."""
    names = path_names(path)
    if not is_stacked(names) or names[-1] != "kernel" or x.ndim > 4:  # of a convolution
        return None
    if names[-2] == "out":  # (layer, heads, head_dim, width)
        return optax.contrib.MuonDimensionNumbers((1, 2), (3,))
    # (layer, width, heads, head_dim) or (layer, inputs, outputs)
    return optax.contrib.MuonDimensionNumbers((1,), tuple(range(2, x.ndim)))


def decay_mask(params: Any, rule: str = "open_clip") -> Any:
    """Make a tree of bools: whether weight decay applies by the rule.

    Raises:
        ConfigError: an unknown rule.
    """
    check_choice("weight_decay_rule", rule, DECAYED)

    def decays(path, _):
        *_, parent, leaf = ("", *path_names(path))
        # List items are named by index: use the name of the list.
        name = parent if leaf.isdigit() else leaf
        return name in DECAYED[rule] or (parent, leaf) in FACTORS

    return jax.tree_util.tree_map_with_path(decays, params)


def _scale_by_tower(rates: dict[str, float]) -> optax.GradientTransformation:
    """Scale the updates of each tower by its rate; those of logit scale and bias stay unscaled."""

    def scale(path, x):
        return x * rates.get(path_names(path)[0], 1.0)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))


def _scale_by_name(rates: Factors) -> optax.GradientTransformation:
    """Scale the updates of parameters by the factors of their names."""

    def scale(path, x):
        return x * first_match(rates, name_of(path), 1.0)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))


def _decay_by_name(strength: float, decays: Factors, mask: Any) -> optax.GradientTransformation:
    """Add decayed weights by the factors of their names; `mask` is for the other parameters."""

    def update(updates, params):
        def decayed(path, u, p, masked):
            return u + strength * first_match(decays, name_of(path), masked) * p

        return jax.tree_util.tree_map_with_path(decayed, updates, params, mask(params))

    return optax.stateless(update)


def _scale_by_layer(decay: float) -> optax.GradientTransformation:
    """Scale the updates of block i of n by decay^(n - i), of layers below by decay^(n + 1).

    Layers after the blocks are not scaled (arXiv:2003.10555, arXiv:2106.08254), such as blocks of a
    head. The blocks of a tower with stages are counted through all of them; in ViTamin those of the
    stages come before those of the transformer.
    """

    def update(updates, _):
        blocks: dict[str, set[Block]] = {}
        attending = set()  # towers whose positions are those of tokens, and not of a pool
        for path, x in jax.tree_util.tree_leaves_with_path(updates):
            names = path_names(path)
            own = _blocks(names, x.shape)
            blocks.setdefault(names[0], set()).update(own)
            if own and {"attention", "transformer"} & {*names}:
                attending.add(names[0])
        order = {tower: sorted(own) for tower, own in blocks.items()}

        def scale(path, x):
            names = path_names(path)
            all_blocks = order[names[0]]
            own = _blocks(names, x.shape)
            if names[1:2] == ("position",) and all_blocks[:1] and all_blocks[0].section == 0:
                own = [Block(1)]  # ViTamin adds them before its transformer
            if own:
                factors = [decay ** (len(all_blocks) - all_blocks.index(block)) for block in own]
                if "blocks" not in names:
                    return x * factors[0]
                return x * jnp.array(factors, x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
            below = _is_below_blocks(names, attends=names[0] in attending)
            return x * decay ** (len(all_blocks) + 1) if below else x

        return jax.tree_util.tree_map_with_path(scale, updates)

    return optax.stateless(update)


class Block(NamedTuple):
    """Position of a block in its tower; sorts in the order of computation."""

    section: int  # 0: in a stem that has stages; 1: after it
    stage: int = 0
    number: int = 0


def _blocks(names: tuple[str, ...], shape: tuple[int, ...]) -> list[Block]:
    """Return the blocks of a parameter: several if stacked, none outside of blocks.

    The first layers of a stage belong to its first block.
    """
    if len(names) < 2 or names[1] not in ("stem", "stages", "transformer", "blocks"):
        return []
    section = int(names[1] != "stem")
    if section == 0 and names[2].startswith("last"):
        return [Block(1)]  # ViTamin: between stages and transformer
    numbers = [0]
    if "stages" in names:
        numbers = [int(n) for n in names[names.index("stages") + 1 :] if n.isdigit()]
    if "first" in names:  # EfficientNet: first block of a stage, of another shape
        return [Block(section, numbers[0], -1)]
    if "blocks" in names:
        return [Block(section, numbers[0], number) for number in range(shape[0])]
    return [Block(section, *numbers[:2])] if "stages" in names else []


def _is_below_blocks(names: tuple[str, ...], *, attends: bool) -> bool:
    """Whether a parameter is below the blocks of its tower, which have attention or not."""
    if names[0] not in ("vision", "text"):
        return False
    if names[1] == "position":
        return attends  # else they are those of a ResNet's pool
    first = ("embedding", "embedding_norm", "class_token", "registers", "pre_norm")
    return names[1].startswith("stem") or names[1] in (*first, "relative_position_bias")
