"""Inputs of a custom loss."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Key


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossInputs:
    """Inputs of a loss function: arrays of the global batch, in one order.

    A loss is a pure function of these that returns a scalar, or (scalar, dict of scalars to log).
    It runs inside the jitted step. Rows are sharded over the mesh axes `data` and `fsdp`.

    Args:
        z_image, z_text: unit-norm float32 embeddings (B, d).
        logit_scale: logarithm of the factor on the cosines.
        logit_bias: bias of the logits; None for a model without it.
        batch: arrays of the data pipeline: `images` uint8 (B, h, w, 3), `tokens` int32 (B, n), and
            with labels `classes` int32 (B,).
        intermediates: the activations that `Experiment.loss_intermediates` names, with the batch as
            first axis.
        key: PRNG key of the step, for a loss that draws random numbers.
        mesh: mesh of the run, for `vlm.losses.all_pairs` and `jax.shard_map`.

    Example:
        >>> def closer_pairs(inputs: vlm.losses.LossInputs):
        ...     cosines = jnp.sum(inputs.z_image * inputs.z_text, axis=1)
        ...     return 1 - cosines.mean()
        >>> vlm.Experiment(losses={"sigmoid": 1.0, closer_pairs: 0.1}).losses[0]
        ('sigmoid', 1.0)
    """

    z_image: Float[Array, "b d"]
    z_text: Float[Array, "b d"]
    logit_scale: Float[Array, ""]
    logit_bias: Float[Array, ""] | None
    batch: Mapping[str, Any]
    intermediates: Mapping[str, Any]
    key: Key[Array, ""]
    mesh: Mesh | AbstractMesh = field(metadata={"static": True})
