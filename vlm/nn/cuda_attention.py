"""cuDNN's fused attention on NVIDIA GPUs: the arrays it supports, and masks as lengths.

It stores no attention weights (FlashAttention-2, arXiv:2307.08691). Its general mask is a bias of
(b, n, n) with a gradient, so a mask over keys becomes the number of keys of each example.
"""

import re
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MIN_COMPUTE_CAPABILITY = 8.0  # that of Ampere
MAX_HEAD_DIM = 128  # Ampere's and Blackwell's backward passes support no wider ones
DTYPES = (jnp.bfloat16, jnp.float16)

Shaped = Array | jax.ShapeDtypeStruct


def fits(query: Shaped, key: Shaped, mask: Shaped | None, *, causal: bool) -> bool:
    """Whether `attend` supports the arrays: self-attention in 16 bits, at most a key mask.

    Source: cuDNN's support matrix (docs.nvidia.com/deeplearning/cudnn/frontend, Attention).
    """
    b, n, _, d = query.shape
    return (
        query.dtype in DTYPES
        and query.shape == key.shape
        and n > 1
        and d % 8 == 0
        and d <= MAX_HEAD_DIM
        and (mask is None or (not causal and mask.shape in ((b,), (b, 1, 1, n))))
    )


def compute_capability() -> float:
    """Compute capability of this machine's NVIDIA GPUs, such as 9.0; 0 without one."""
    if jax.default_backend() != "gpu":
        return 0.0
    generation = getattr(jax.devices()[0], "compute_capability", "0")  # not a number for AMD
    return float(generation) if re.fullmatch(r"\d+\.\d+", generation) else 0.0


def attend(
    query: Float[Array, "b n h d"],
    key: Float[Array, "b n h d"],
    value: Float[Array, "b n h d"],
    mask: Bool[Array, "b 1 1 n"] | Int[Array, " b"] | None = None,
    *,
    causal: bool = False,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "b n h d"]:
    """softmax(query key^T / sqrt(d)) value of every head, for arrays that `fits` accepts.

    `mask` is true for real keys, or is how many of the first keys are real. Queries of padding
    attend too, so that every row is finite. An example without a real key has equal
    weights, as on other platforms.
    "xla" is the reference implementation of the same function, for any dtype and platform.
    """
    n, lengths = query.shape[1], mask
    if mask is not None and mask.ndim == 4:
        # The result does not depend on the order of the keys: the real ones go first.
        real = mask[:, 0, 0]
        order = jnp.argsort(~real, axis=1, stable=True)
        key, value, lengths = _rows(key, order), _rows(value, order), real.sum(1)
    if lengths is not None:
        attends = lengths > 0
        query = jnp.where(attends[:, None, None, None], query, 0)
        lengths = jnp.where(attends, lengths, n).astype(jnp.int32)
    if n % 2:  # the backward pass needs an even length
        query, key, value = (
            jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (query, key, value)
        )
        if lengths is None and not causal:
            lengths = jnp.full(len(query), n, jnp.int32)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        is_causal=causal,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )[:, :n]


@jax.vmap
def _rows(x: Array, order: Array) -> Array:
    """Rows of each example in another order; its gradient needs no atomic additions."""
    return x.at[order].get(unique_indices=True, mode="promise_in_bounds")
