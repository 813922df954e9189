"""Fused attention kernel for TPUs, which keeps attention weights in VMEM.

The towers' sequences are short (77 tokens, 257 patches), so all weights of a head fit in VMEM, or
those of a block of queries for all keys. The kernel is therefore simpler than FlashAttention
(arXiv:2205.14135): it needs no blockwise softmax, and one backward pass that uses only the inputs.
Sequences that do not fit, of about 2,000 tokens and more, use JAX's FlashAttention, which copies
its arrays into another layout.

Arrays keep the layout of the projections, (b, n, h * d), so nothing is transposed, padded or copied
on the way. One kernel invocation processes some examples and some heads. Heads of 72, 88 or 104
dimensions begin inside a vector register; the compiler shifts them in VMEM.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh
from jaxtyping import Array, BFloat16, Bool

from vlm.chips import chip_of

LANES = 128  # lanes of a vector register, the unit of the last axis
HEAD = 8  # unit of the head dimension that the compiler accepts
WIDE_HEAD = 64  # unit where all heads of a narrower unit do not fit in VMEM
WEIGHTS = 2**20  # approximate attention weights of a head that are in VMEM at a time
FLASH_HEAD = 128  # largest head dimension of FlashAttention
FLASH_BLOCK = 512  # queries and keys of a block of FlashAttention
BLOCK = 2**17  # approximate elements of an array per kernel invocation
DEFAULT_VMEM = 2**24  # bytes that the compiler gives a kernel by default


class _Form(NamedTuple):
    """Static parameters of the kernels."""

    heads: int
    scale: float
    causal: bool
    vmem: int  # bytes that a kernel may use
    interpret: bool  # run in interpret mode on any device, for tests


Shaped = Array | jax.ShapeDtypeStruct


def fits(query: Shaped, key: Shaped, mask: Shaped | None) -> bool:
    """Whether the kernel supports the arrays: bfloat16, self-attention, at most a key mask."""
    n = query.shape[1]
    return (
        query.dtype == jnp.bfloat16
        and query.shape == key.shape
        and n >= 8
        and takes(n, query.shape[-1])
        and (mask is None or mask.shape == (len(query), 1, 1, n))
    )


def takes(tokens: int, head_dim: int) -> bool:
    """Whether one of the kernels supports sequences and heads of these sizes."""
    return tokens**2 <= WEIGHTS or head_dim <= FLASH_HEAD


def runs_on(mesh: AbstractMesh) -> bool:
    """Whether kernels on the mesh's devices support bfloat16 products: TPUs from v4 on."""
    device = mesh.abstract_device
    return device is None or device.device_kind not in ("TPU v2", "TPU v3")


def vmem_on(mesh: AbstractMesh) -> int:
    """Bytes of VMEM that a kernel may use on the mesh's devices: 3/4, but the default at least."""
    device = mesh.abstract_device
    chip = None if device is None else chip_of(device.device_kind)
    return max(DEFAULT_VMEM, 0 if chip is None else chip.vmem * 3 // 4)


def attend(
    query: BFloat16[Array, "b n w"],
    key: BFloat16[Array, "b n w"],
    value: BFloat16[Array, "b n w"],
    mask: Bool[Array, "b 1 1 n"] | None = None,
    *,
    heads: int,
    causal: bool = False,
    vmem: int = DEFAULT_VMEM,
    interpret: bool = False,
) -> BFloat16[Array, "b n w"]:
    """softmax(query key^T / sqrt(d)) value of every head, for arrays that `fits` accepts.

    The last axis is `heads` times d. Products are bfloat16 with float32 accumulation; the softmax
    is float32. On a mesh, call it inside `jax.shard_map`, since XLA cannot partition a kernel.
    """
    b, n, width = query.shape
    d = width // heads
    if _rows(n) < n and not _fits_vmem(heads, d + -d % WIDE_HEAD, n, vmem):
        return _flash(query, key, value, mask, heads=heads, causal=causal)
    form = _Form(heads, d**-0.5, causal, vmem, interpret)
    # float32, which every generation can load and broadcast.
    keep = None if mask is None else mask[:, 0].astype(jnp.float32)
    extra = -d % _unit(heads, d, n, vmem)
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
        out = []
        for block in _blocks(len(q)):
            powers, total, _ = _softmax(form, q, k, keep, block)
            out.append(_dot(powers.astype(v.dtype), v, 1, 0) / total)
        return (jnp.concatenate(out),)

    return _run(form, one_head, 1, 2, [query, key, value], keep)[0]


def _backward(form: _Form, query, key, value, keep, gradient):
    def one_head(q, k, v, g, keep):
        d_query, d_key, d_value = [], 0.0, 0.0
        for block in _blocks(len(q)):
            powers, total, scale = _softmax(form, q, k, keep, block)
            weights = powers / total
            d_value += _dot(weights.astype(g.dtype), g[block], 0, 0)
            d_weights = _dot(g[block], v, 1, 1)
            mean = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
            d_logits = (weights * (d_weights - mean) * scale).astype(q.dtype)
            d_query.append(_dot(d_logits, k, 1, 0))
            d_key += _dot(d_logits, q[block], 0, 0)
        return jnp.concatenate(d_query), d_key, d_value

    return tuple(_run(form, one_head, 3, 5, [query, key, value, gradient], keep))


def _blocks(n: int) -> list[slice]:
    """Divide `n` queries into blocks whose weights fit in VMEM."""
    rows = _rows(n)
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def _rows(n: int) -> int:
    """Number of queries in a block: all of `n` where their weights fit."""
    return n if n * n <= WEIGHTS else max(LANES, WEIGHTS // n // LANES * LANES)


def _softmax(form: _Form, q, k, keep, block: slice):
    """Compute exp(logits - max) of a block of queries, its row sums, and the scale of gradients.

    In float32. That of a query without a key is 0: its logits do not depend on query and keys.
    """
    logits = _dot(q[block], k, 1, 1) * form.scale
    least = jnp.finfo(jnp.float32).min
    if form.causal:
        rows, columns = (lax.broadcasted_iota(jnp.int32, logits.shape, d) for d in (0, 1))
        logits = jnp.where(block.start + rows >= columns, logits, least)
    if keep is not None:
        logits = jnp.where(keep > 0, logits, least)
    most = logits.max(axis=-1, keepdims=True)
    powers = jnp.exp(logits - most)
    return powers, powers.sum(axis=-1, keepdims=True), jnp.where(most > least, form.scale, 0.0)


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

    # Imported where a TPU's program is made: it takes longer than the rest of this package's `nn`.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

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
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=form.vmem),
        interpret=form.interpret,
        name="attention" if results == 1 else "attention_backward",
    )(*flat)


def _heads_per_run(heads: int, d: int, n: int) -> int:
    """Number of heads per invocation: full registers, and enough work."""
    divisors = [h for h in range(1, heads) if heads % h == 0 and h * d % LANES == 0]
    return next((h for h in divisors if h * d * n >= BLOCK // 2), heads)


def _unit(heads: int, d: int, n: int, vmem: int) -> int:
    """Unit to which the head dimension is padded in memory, which costs copies."""
    return HEAD if _fits_vmem(heads, d + -d % HEAD, n, vmem) else WIDE_HEAD


def _fits_vmem(heads: int, d: int, n: int, vmem: int) -> bool:
    """Whether a backward pass needs at most 3/4 of `vmem`.

    It has seven arrays in two buffers each, and float32 matrices of weights. Where queries are in
    blocks, it has float32 sums over them, and the compiler keeps 3 bytes of every weight.
    """
    per_run = _heads_per_run(heads, d, n)
    arrays = 7 * 2 * 2 * n * d * per_run
    in_blocks = _rows(n) < n
    weights = 3 * 4 * n * LANES + 3 * per_run * n**2 if in_blocks else 3 * 4 * n**2
    return arrays + weights <= 3 * vmem // 4


# ------------------------------------------------------------------------ long sequences


def _flash(query, key, value, mask, *, heads: int, causal: bool) -> jax.Array:
    """FlashAttention of arrays (b, n, w), padded to whole blocks; nobody attends to the padding."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    b, n, width = query.shape
    extra = -n % FLASH_BLOCK
    fields = (field.name for field in dataclasses.fields(flash.BlockSizes))
    blocks = dict.fromkeys(fields, FLASH_BLOCK) | {"block_b": 1}

    def by_head(x):
        x = jnp.pad(x, ((0, 0), (0, extra), (0, 0)))
        return x.reshape(b, n + extra, heads, -1).transpose(0, 2, 1, 3)

    keep = jnp.ones((b, n), bool) if mask is None else mask[:, 0, 0]
    keep = jnp.pad(keep, ((0, 0), (0, extra))).astype(jnp.int32)
    out = flash.flash_attention(
        *map(by_head, (query, key, value)),
        segment_ids=flash.SegmentIds(jnp.ones_like(keep), keep),
        causal=causal,
        sm_scale=(width // heads) ** -0.5,
        block_sizes=flash.BlockSizes(**blocks),
    )
    return out.transpose(0, 2, 1, 3).reshape(b, n + extra, width)[:, :n]
