"""Multi-head attention, with the fastest form that each kind of device has."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from vlm.nn.rotary import Rotation, rotate


def attend(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b k h d"],
    value: Float[Array, "b k h d"],
    mask: Bool[Array, "b #h #q k"] | None = None,
    *,
    causal: bool = False,
) -> Float[Array, "b q h d"]:
    """softmax(query key^T / sqrt(d)) value (Vaswani et al., 2017, arXiv:1706.03762).

    `mask` is true where a query may look. The softmax is taken in float32. The form is chosen
    when the computation is lowered, so that a plan for a TPU made on a CPU sees the TPU's.
    """
    return lax.platform_dependent(
        query,
        key,
        value,
        mask,
        cpu=lambda *args: _attend_by_head(*args, causal=causal),
        default=lambda q, k, v, m: jax.nn.dot_product_attention(q, k, v, mask=m, is_causal=causal),
    )


def _attend_by_head(query, key, value, mask, *, causal):
    """Attention with the heads outermost: XLA's CPU products want the batch axes in front."""
    query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))  # (b, h, n, d)
    logits = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
    logits = logits * (query.shape[-1] ** -0.5)
    if causal:
        visible = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        mask = visible if mask is None else mask & visible
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, value).transpose(0, 2, 1, 3)


class Attention(nnx.Module):
    """Multi-head attention: projections of shape (width, heads, head_dim) and back.

    What is attended to may have another width, `context_width`, and so may the result.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        context_width: int | None = None,
        output_width: int | None = None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        def project(inputs, outputs, axis):
            init = nnx.initializers.xavier_uniform()
            return nnx.LinearGeneral(
                inputs, outputs, axis=axis, kernel_init=init, dtype=dtype, rngs=rngs
            )

        split = (heads, width // heads)
        self.query = project(width, split, -1)
        self.key = project(context_width or width, split, -1)
        self.value = project(context_width or width, split, -1)
        self.out = project(split, output_width or width, (-2, -1))

    def __call__(
        self,
        x: Float[Array, "b q d"],
        context: Float[Array, "b k d"] | None = None,
        mask: Bool[Array, "b #h #q k"] | None = None,
        *,
        causal: bool = False,
        rotation: Rotation | None = None,
    ) -> Float[Array, "b q d"]:
        """Tokens of `x` attend to those of `context`, by default their own."""
        context = x if context is None else context
        query, key, value = self.query(x), self.key(context), self.value(context)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        return self.out(attend(query, key, value, mask, causal=causal))
