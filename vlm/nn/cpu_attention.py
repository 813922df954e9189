"""Attention in parts, as CPUs run it fastest, and attention that makes all weights at once."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from vlm.nn.intermediates import Intermediates, capture
from vlm.nn.positions import Alibi

# Softmax weights made at a time, for sequences longer than `_LONG`: 4 MiB of float32 stay in the
# cache. Those of whole batches are allocated again in each layer, and page faults take most time.
_WEIGHTS = 1 << 20
_LONG = 256
# True where a query may attend, or numbers to add to the logits, or the slopes of ALiBi.
Mask = Bool[Array, "#b #h #q k"] | Float[Array, "#b #h #q k"] | Alibi


def attend_in_parts(
    query: Float[Array, "#b q h d"],
    key: Float[Array, "b k h d"],
    value: Float[Array, "b k h d"],
    mask: Mask | None = None,
    *,
    causal: bool = False,
    softcap: float | None = None,
) -> Float[Array, "b q h d"]:
    """softmax(query key^T / sqrt(d)) value, a few heads at a time if the sequence is long."""
    mesh = jax.typeof(query).sharding.mesh
    one_device = mesh.empty or mesh.size == 1
    if key.shape[1] <= _LONG or query.shape[0] != key.shape[0] or not one_device:
        return attend_at_once(query, key, value, mask, causal=causal, softcap=softcap)
    query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    return _in_parts(query, key, value, mask, causal, softcap).transpose(0, 2, 1, 3)


def attend_at_once(
    query: Float[Array, "#b q h d"],
    key: Float[Array, "b k h d"],
    value: Float[Array, "b k h d"],
    mask: Mask | None = None,
    *,
    causal: bool = False,
    softcap: float | None = None,
    intermediates: Intermediates | None = None,
) -> Float[Array, "b q h d"]:
    """softmax(query key^T / sqrt(d)) value; `intermediates` capture the weights "attention"."""
    # A leading head axis, for which XLA's CPU products are fastest: (b, h, n, d).
    query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    positions = jnp.arange(query.shape[2])
    out = _attend(query, key, value, mask, positions, causal, softcap, intermediates)
    return out.transpose(0, 2, 1, 3)


def _attend(query, key, value, mask, positions, causal, softcap, intermediates=None):
    """Attention of arrays (b, h, n, d), of queries at `positions`.

    The products of the weights are divided by their sum.
    """
    logits = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
    logits = logits * (query.shape[-1] ** -0.5)
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    logits = _masked(logits, mask, positions, causal)
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


def _masked(logits, mask, positions, causal):
    """Mask the logits of queries at `positions`; no mask of all queries is made."""
    lowest = jnp.finfo(jnp.float32).min
    distance = positions[:, None] - jnp.arange(logits.shape[-1])
    if isinstance(mask, Alibi):
        logits, mask = logits - mask.slopes * jnp.abs(distance), mask.keys
    if mask is not None:
        logits = jnp.where(mask, logits, lowest) if mask.dtype == bool else logits + mask
    return jnp.where(distance >= 0, logits, lowest) if causal else logits


def _in_parts(query, key, value, mask, causal, softcap):
    """`_attend` by `lax.map` over groups of heads, or over parts of the queries of each head."""
    b, h, n, d = query.shape
    weights = n * key.shape[2]
    heads = math.gcd(b * h, 1 << max(0, (_WEIGHTS // weights).bit_length() - 1))
    queries = -(-n // -(-weights // _WEIGHTS))  # of a part; n if one head is small enough

    def attend_group(group):
        numbers, query, key, value = group

        def attend_part(part):
            first, query = part
            positions = first + jnp.arange(queries)
            places = numbers // h, numbers % h, positions
            mask_part = jax.tree.map(lambda x: _mask_part(x, *places), mask)
            return _attend(query, key, value, mask_part, positions, causal, softcap)

        if queries == n:
            return attend_part((0, query))
        # More than one part: the group is one head.
        padded = jnp.pad(query, ((0, 0), (0, 0), (0, -n % queries), (0, 0)))
        parts = jnp.arange(0, n, queries), padded.reshape(-1, 1, 1, queries, d)
        return lax.map(attend_part, parts).reshape(1, 1, -1, d)[:, :, :n]

    groups = (x.reshape(-1, heads, 1, *x.shape[2:]) for x in (query, key, value))
    numbers = jnp.arange(b * h).reshape(-1, heads)  # of heads, counted over the batch
    return lax.map(attend_group, (numbers, *groups)).reshape(b, h, n, d)


def _mask_part(mask, examples, heads, positions):
    """Rows of a mask, with a leading axis of heads; an axis of size 1 is not expanded.

    Positions after the last query are padding, which takes the last row.
    """
    examples, heads, positions = (
        jnp.minimum(index, size - 1)
        for index, size in zip((examples, heads, positions), mask.shape[:3], strict=True)
    )
    positions = positions[: mask.shape[2]]
    places = examples[:, None], heads[:, None], positions
    return mask.at[places].get(mode="promise_in_bounds")[:, None]
