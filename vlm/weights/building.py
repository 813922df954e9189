"""A model of a checkpoint: first its shapes alone, then the parameters of both towers or of one."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from vlm.config import ModelConfig
from vlm.errors import ConfigError
from vlm.models.dual_encoder import DualEncoder
from vlm.nn.transformer import Execution
from vlm.weights.files import Tensors
from vlm.weights.rules import Rule, expand, fill, flat_shapes

Tower = Literal["both", "image", "text"]


def abstract_model(config: ModelConfig, dtype: jnp.dtype) -> DualEncoder:
    """A model of shapes alone, to be filled."""
    execution = Execution(dtype=dtype)
    return nnx.eval_shape(lambda: DualEncoder(config, execution=execution, rngs=nnx.Rngs(0)))


def fill_towers(
    skeleton: DualEncoder,
    rules: Sequence[Rule],
    tensors: Tensors,
    tower: Tower,
    *,
    ignored: Callable[[str], bool] = lambda name: False,
    **options: Any,
) -> DualEncoder:
    """`rules.fill` for both towers or for one, the other being dropped from the model.

    Raises:
        CheckpointError: the file does not fit the model.
        ConfigError: `tower` is something else.
    """
    if tower == "both":
        return fill(skeleton, rules, tensors, ignored=ignored, **options)
    other = {"image": "text", "text": "vision"}.get(tower)
    if other is None:
        raise ConfigError(f"tower {tower!r} is unknown: choose both, image or text")
    pieces = expand(rules, flat_shapes(skeleton))
    left = {piece.theirs for piece in pieces if piece.ours.startswith(f"{other}.")}
    kept = [rule for rule in rules if not _ours(rule).startswith(f"{other}.")]
    setattr(skeleton, other, None)
    return fill(
        skeleton, kept, tensors, ignored=lambda name: name in left or ignored(name), **options
    )


def _ours(rule: Rule) -> str:
    return rule.ours if isinstance(rule.ours, str) else rule.ours[0]
