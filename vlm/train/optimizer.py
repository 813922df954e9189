"""Update rules and schedules over a tree of parameters.

A schedule is a function of the run's progress in [0, 1], so that a run's length may be given in
steps, epochs, examples or seconds and lives in the state, not in the compiled step.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from vlm.config import OptimizerConfig
from vlm.sharding import path_names

# Parameters that weight decay pulls towards zero: those that multiply. Not norms, biases, scale.
DECAYED = {"kernel", "embedding", "position", "probe"}


def learning_rate(config: OptimizerConfig, progress: Float[Array, ""]) -> Float[Array, ""]:
    """The learning rate after a share `progress` of the run.

    Linear warm-up, then one of: half a cosine to zero (arXiv:1608.03983); the reciprocal square
    root of the progress, cooled down to zero (arXiv:2106.04560); a plateau, cooled down to zero
    (warmup-stable-decay, arXiv:2405.18392); a plateau.
    """
    warmup, cooldown = config.warmup, config.cooldown
    rise = jnp.minimum(1.0, progress / warmup) if warmup > 0 else jnp.ones(())
    fall = jnp.clip((1 - progress) / cooldown, 0, 1) if cooldown > 0 else jnp.ones(())
    if config.schedule == "cosine":
        past = jnp.clip((progress - warmup) / (1 - warmup), 0, 1)
        shape = rise * 0.5 * (1 + jnp.cos(jnp.pi * past))
    elif config.schedule == "rsqrt":
        start = max(warmup, 1e-3)
        shape = rise * jnp.sqrt(start / jnp.maximum(progress, start)) * fall
    elif config.schedule == "wsd":
        shape = rise * fall
    else:
        shape = rise
    return config.learning_rate * shape


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradients to updates, but for the learning rate, which the step multiplies in.

    Clipping by the global norm, the update rule, decoupled weight decay, and layer-wise decay.
    """
    parts = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    parts.append(_rule(config))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decay_mask))
    if config.layer_decay != 1.0:
        parts.append(_scale_by_layer(config.layer_decay))
    return optax.chain(*parts)


def _rule(config: OptimizerConfig) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    if config.name == "adamw":  # arXiv:1711.05101
        return adam
    if config.name == "lion":  # arXiv:2302.06675
        return optax.scale_by_lion(b1=config.b1, b2=config.b2)
    if config.name == "adafactor":  # as big_vision scales it (arXiv:2106.04560): bfloat16 momentum
        return optax.chain(
            optax.scale_by_factored_rms(decay_rate=0.8, min_dim_size_to_factor=32),
            optax.clip_by_block_rms(1.0),
            optax.ema(config.b1, debias=False, accumulator_dtype=jnp.bfloat16),
        )
    # Muon orthogonalises the momentum of the blocks' matrices (Jordan et al., 2024,
    # kellerjordan.github.io/posts/muon); the rest are Adam's. Its updates are scaled to the
    # root-mean-square of Adam's (arXiv:2502.16982), so one learning rate serves both.
    return optax.contrib.muon(
        learning_rate=-1.0,  # the step subtracts the update, so undo the sign here
        adam_b1=config.b1,
        adam_b2=config.b2,
        eps=config.eps,
        muon_weight_dimension_numbers=_muon_dimensions,
        consistent_rms=0.2,
    )


def _muon_dimensions(params: Any) -> Any:
    """The axes of each hidden matrix; None for what is no hidden matrix."""
    return jax.tree_util.tree_map_with_path(_matrix_axes, params)


def _matrix_axes(path: tuple, x: Any) -> optax.contrib.MuonDimensionNumbers | None:
    names = path_names(path)
    if "blocks" not in names or names[-1] != "kernel":
        return None
    if names[-2] == "out":  # (layer, heads, head_dim, width)
        return optax.contrib.MuonDimensionNumbers((1, 2), (3,))
    # (layer, width, heads, head_dim) or (layer, inputs, outputs)
    return optax.contrib.MuonDimensionNumbers((1,), tuple(range(2, x.ndim)))


def decay_mask(params: Any) -> Any:
    """True where weight decay applies."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_names(path)[-1] in DECAYED, params)


def _scale_by_layer(decay: float) -> optax.GradientTransformation:
    """Scale the updates of block i of n by decay^(n - i), and of what lies below by decay^(n + 1).

    What follows the blocks keeps its rate (arXiv:2003.10555, arXiv:2106.08254).
    """
    above = {"norm", "pool", "projection", "logit_scale", "logit_bias"}

    def update(updates, state, params=None):
        depth = {
            path_names(path)[0]: x.shape[0]
            for path, x in jax.tree_util.tree_leaves_with_path(updates)
            if "blocks" in path_names(path)
        }

        def scale(path, x):
            names = path_names(path)
            if "blocks" in names:
                factors = decay ** jnp.arange(depth[names[0]], 0, -1, dtype=x.dtype)
                return x * factors.reshape(-1, *(1,) * (x.ndim - 1))
            if names[0] in above or names[1] in above:
                return x
            return x * decay ** (depth[names[0]] + 1)

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
