"""Sequential application of blocks whose parameters are stacked along a leading axis."""

from collections.abc import Callable

import jax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from vlm.config import RematPolicy
from vlm.nn.remat import checkpoint_policy


def run_stacked(
    blocks: nnx.Module,
    x: Float[Array, "b h w c"],
    step: Callable,
    *,
    depth: int,
    remat: RematPolicy,
    scan: bool,
) -> Float[Array, "b h w c"]:
    """Apply `step(block, x)` for each of `depth` blocks.

    With `scan` the block is compiled once, otherwise the loop is unrolled.
    """
    block, parameters = nnx.split(blocks)

    def layer(x, parameters):
        return step(nnx.merge(block, parameters), x), None

    if remat != "none":
        layer = jax.checkpoint(layer, policy=checkpoint_policy(remat), prevent_cse=not scan)
    x, _ = lax.scan(layer, x, nnx.to_pure_dict(parameters), unroll=1 if scan else depth)
    return x
