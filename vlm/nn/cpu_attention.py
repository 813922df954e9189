"""Attention in parts, as CPUs run it fastest; also where weights are captured or logits bounded."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from vlm.nn.intermediates import Intermediates, capture

# Softmax weights made at a time, for sequences longer than `_LONG`: 4 MiB of float32 stay in the
# cache. Those of whole batches are allocated again in each layer, and page faults take most time.
_WEIGHTS = 1 << 20
_LONG = 256
# True where a query may attend, or numbers to add to the logits.
Mask = Bool[Array, "#b #h #q k"] | Float[Array, "#b #h #q k"]


def attend_in_parts(
    query: Float[Array, "#b q h d"],
    key: Float[Array, "b k h d"],
    value: Float[Array, "b k h d"],
    mask: Mask | None = None,
    *,
    causal: bool = False,
    softcap: float | None = None,
    intermediates: Intermediates | None = None,
) -> Float[Array, "b q h d"]:
    """softmax(query key^T / sqrt(d)) value, a few heads at a time if the sequence is long.

    With `intermediates` it makes all weights at once, and captures them as "attention".
    """
    # A leading head axis, for which XLA's CPU products are fastest: (b, h, n, d).
    query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    if causal:
        visible = jnp.tril(jnp.ones((query.shape[2], key.shape[2]), bool))
        mask = visible if mask is None else mask & visible
    mesh = jax.typeof(query).sharding.mesh
    at_once = intermediates is not None or query.shape[:2] != key.shape[:2]
    if at_once or key.shape[2] <= _LONG or not (mesh.empty or mesh.size == 1):
        out = _attend(query, key, value, mask, softcap, intermediates)
    else:
        out = _in_parts(query, key, value, mask, softcap)
    return out.transpose(0, 2, 1, 3)


def _attend(query, key, value, mask, softcap, intermediates=None):
    """Attention of arrays (b, h, n, d). The products of the weights are divided by their sum."""
    logits = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
    logits = logits * (query.shape[-1] ** -0.5)
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    if mask is not None:
        lowest = jnp.finfo(jnp.float32).min
        logits = jnp.where(mask, logits, lowest) if mask.dtype == bool else logits + mask
    if intermediates is not None:
        weights = capture(intermediates, "attention", jax.nn.softmax(logits, axis=-1))
        return jnp.einsum("bhqk,bhkd->bhqd", weights.astype(value.dtype), value)
    weights = jnp.exp(logits - lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum(
        "bhqk,bhkd->bhqd",
        weights.astype(value.dtype),
        value,
        preferred_element_type=jnp.float32,
    )
    return (out / total).astype(value.dtype)


def _in_parts(query, key, value, mask, softcap):
    """`_attend` by `lax.map` over groups of heads, or over parts of the queries of each head."""
    b, h, n, d = query.shape
    weights = n * key.shape[2]
    heads = math.gcd(b * h, 1 << max(0, (_WEIGHTS // weights).bit_length() - 1))
    queries = -(-n // -(-weights // _WEIGHTS))  # of a part; n if one head is small enough
    padding = -n % queries
    if mask is not None:
        mask = jnp.broadcast_to(mask, (b, h, *mask.shape[-2:]))

    def by_group(x):
        return None if x is None else x.reshape(-1, heads, 1, *x.shape[2:])

    def by_part(x):
        x = jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0)))
        return jnp.moveaxis(x.reshape(heads, 1, -1, queries, x.shape[-1]), 2, 0)

    def attend_group(arrays):
        query, key, value, mask = arrays
        if queries == n:
            return _attend(query, key, value, mask, softcap)
        whole_mask = mask is None or mask.shape[2] == 1  # the same for each query
        parts = by_part(query), None if whole_mask else by_part(mask)

        def attend_part(part):
            rows, own = part
            return _attend(rows, key, value, mask if whole_mask else own, softcap)

        out = jnp.moveaxis(lax.map(attend_part, parts), 0, 2)
        return out.reshape(heads, 1, -1, d)[:, :, :n]

    groups = (by_group(query), by_group(key), by_group(value), by_group(mask))
    return lax.map(attend_group, groups).reshape(b, h, n, d)
