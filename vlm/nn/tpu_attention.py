"""Fused attention kernel for TPUs, which keeps attention weights in VMEM.

The towers' sequences are short (77 tokens, 257 patches), so all weights of a head fit in VMEM. The
kernel is therefore simpler than FlashAttention (arXiv:2205.14135): it needs no blockwise softmax,
and one backward pass that uses only the inputs.

Arrays keep the layout of the projections, (b, n, h * d), so nothing is transposed, padded or copied
on the way. One kernel invocation processes some examples and some heads. Heads of 72, 88 or 104
dimensions begin inside a vector register; the compiler shifts them in VMEM.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh
from jaxtyping import Array, BFloat16, Bool

LANES = 128  # lanes of a vector register, the unit of the last axis
HEAD = 8  # unit of the head dimension that the compiler accepts
WIDE_HEAD = 64  # unit for long sequences, where all heads of a narrower unit do not fit in VMEM
MANY_TOKENS = 288  # tokens: longer sequences use `WIDE_HEAD`
LARGEST = 5 * 2**16  # elements of an example's array per kernel invocation, beyond which also
LONGEST = 1024  # tokens: longer weight matrices do not fit in VMEM
BLOCK = 2**17  # approximate elements of an array per kernel invocation


class _Form(NamedTuple):
    """Static parameters of the kernels."""

    heads: int
    scale: float
    causal: bool
    interpret: bool  # run in interpret mode on any device, for tests


Shaped = Array | jax.ShapeDtypeStruct


def fits(query: Shaped, key: Shaped, mask: Shaped | None) -> bool:
    """Whether the kernel supports the arrays: bfloat16, self-attention, at most a key mask."""
    n = query.shape[1]
    return (
        query.dtype == jnp.bfloat16
        and query.shape == key.shape
        and 8 <= n <= LONGEST
        and (mask is None or mask.shape == (len(query), 1, 1, n))
    )


def runs_on(mesh: AbstractMesh) -> bool:
    """Whether kernels on the mesh's devices support bfloat16 products: TPUs from v4 on."""
    device = mesh.abstract_device
    return device is None or device.device_kind not in ("TPU v2", "TPU v3")


def attend(
    query: BFloat16[Array, "b n w"],
    key: BFloat16[Array, "b n w"],
    value: BFloat16[Array, "b n w"],
    mask: Bool[Array, "b 1 1 n"] | None = None,
    *,
    heads: int,
    causal: bool = False,
    interpret: bool = False,
) -> BFloat16[Array, "b n w"]:
    """softmax(query key^T / sqrt(d)) value of every head, for arrays that `fits` accepts.

    The last axis is `heads` times d. Products are bfloat16 with float32 accumulation; the softmax
    is float32. On a mesh, call it inside `jax.shard_map`, since XLA cannot partition a kernel.
    """
    b, n, width = query.shape
    d = width // heads
    form = _Form(heads, d**-0.5, causal, interpret)
    # float32, which every generation can load and broadcast.
    keep = None if mask is None else mask[:, 0].astype(jnp.float32)
    extra = -d % _unit(heads, d, n)
    if not extra:
        return _attention(form, query, key, value, keep)
    # Zeros change no product.
    by_head = (x.reshape(b, n, heads, d) for x in (query, key, value))
    padded = (jnp.pad(x, [(0, 0)] * 3 + [(0, extra)]).reshape(b, n, -1) for x in by_head)
    out: jax.Array = _attention(form, *padded, keep)
    return out.reshape(b, n, heads, -1)[..., :d].reshape(b, n, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(form, query, key, value, keep) -> jax.Array:
    return _forward(form, query, key, value, keep)


def _attention_forward(form, query, key, value, keep):
    return _attention(form, query, key, value, keep), (query, key, value, keep)


def _attention_backward(form, residuals, gradient):
    query, key, value, keep = residuals
    gradients = _backward(form, query, key, value, keep, gradient)
    return *gradients, None if keep is None else jnp.zeros_like(keep)


_attention.defvjp(_attention_forward, _attention_backward)


# ------------------------------------------------------------------------ the kernels


def _forward(form: _Form, query, key, value, keep) -> jax.Array:
    def one_head(q, k, v, keep):
        powers, total = _softmax(form, q, k, keep)
        return (_dot(powers.astype(v.dtype), v, 1, 0) / total,)

    return _run(form, one_head, 1, 2, [query, key, value], keep)[0]


def _backward(form: _Form, query, key, value, keep, gradient):
    def one_head(q, k, v, g, keep):
        powers, total = _softmax(form, q, k, keep)
        weights = powers / total
        d_value = _dot(weights.astype(g.dtype), g, 0, 0)
        d_weights = _dot(g, v, 1, 1)
        mean = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
        d_logits = (weights * (d_weights - mean) * form.scale).astype(q.dtype)
        return _dot(d_logits, k, 1, 0), _dot(d_logits, q, 0, 0), d_value

    return tuple(_run(form, one_head, 3, 5, [query, key, value, gradient], keep))


def _softmax(form: _Form, q, k, keep):
    """Compute exp(logits - max) and its row sums, in float32."""
    logits = _dot(q, k, 1, 1) * form.scale
    least = jnp.finfo(jnp.float32).min
    if form.causal:
        rows, columns = (lax.broadcasted_iota(jnp.int32, logits.shape, d) for d in (0, 1))
        logits = jnp.where(rows >= columns, logits, least)
    if keep is not None:
        logits = jnp.where(keep > 0, logits, least)
    powers = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers, powers.sum(axis=-1, keepdims=True)


def _dot(x, y, x_axis: int, y_axis: int):
    """Contract one axis of each array, accumulating in float32."""
    numbers = (((x_axis,), (y_axis,)), ((), ()))
    return lax.dot_general(x, y, numbers, preferred_element_type=jnp.float32)


def _run(form: _Form, one_head, results: int, products: int, arrays, keep):
    """Run `one_head` on the (n, d) arrays and mask of every example and head."""
    b, n, width = arrays[0].shape
    heads, d = form.heads, width // form.heads
    per_run = _heads_per_run(heads, d, n)
    lanes = per_run * d
    examples = max(1, min(b, BLOCK // (n * lanes)))

    def kernel(*refs):
        inputs, outputs = refs[:-results], refs[-results:]
        keep_ref = None
        if keep is not None:
            *inputs, keep_ref = inputs

        def one_example(i, _):
            own_keep = None if keep_ref is None else keep_ref[i]
            for h in range(per_run):
                own = slice(h * d, (h + 1) * d)
                results_of_head = one_head(*(ref[i, :, own] for ref in inputs), own_keep)
                for ref, x in zip(outputs, results_of_head, strict=True):
                    ref[i, :, own] = x.astype(ref.dtype)
            return _

        lax.fori_loop(0, examples, one_example, 0)

    flat = list(arrays)
    block = pl.BlockSpec((examples, n, lanes), lambda i, j: (i, 0, j))
    blocks = [block] * len(flat)
    if keep is not None:
        flat.append(keep)
        blocks.append(pl.BlockSpec((examples, 1, n), lambda i, j: (i, 0, 0)))
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(b, examples), heads // per_run),
        in_specs=blocks,
        out_specs=[block] * results,
        out_shape=[jax.ShapeDtypeStruct(flat[0].shape, arrays[0].dtype)] * results,
        cost_estimate=pl.CostEstimate(
            flops=products * 2 * b * heads * n**2 * d,
            transcendentals=b * heads * n**2,
            bytes_accessed=(len(arrays) + results) * 2 * b * n * width,
        ),
        interpret=form.interpret,
        name="attention" if results == 1 else "attention_backward",
    )(*flat)


def _heads_per_run(heads: int, d: int, n: int) -> int:
    """Number of heads per invocation: full registers, and enough work."""
    divisors = [h for h in range(1, heads) if heads % h == 0 and h * d % LANES == 0]
    return next((h for h in divisors if h * d * n >= BLOCK // 2), heads)


def _unit(heads: int, d: int, n: int) -> int:
    """Unit to which the head dimension is padded in memory, which costs copies."""
    d += -d % HEAD
    fit = n <= MANY_TOKENS and _heads_per_run(heads, d, n) * d * n <= LARGEST
    return HEAD if fit else WIDE_HEAD
