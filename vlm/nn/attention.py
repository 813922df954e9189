"""Multi-head attention, with the fastest implementation for each platform."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from vlm.nn import cuda_attention, tpu_attention
from vlm.nn.auto_axes import auto_axes
from vlm.nn.cpu_attention import Mask, attend_at_once, attend_in_parts
from vlm.nn.intermediates import Intermediates
from vlm.nn.layers import LayerNorm, RMSNorm, linear
from vlm.nn.positions import Alibi, Rotation, rotate
from vlm.nn.remat import ATTENDED, PROJECTED
from vlm.sharding import batch_ways, free_batch_axes, mesh_of

Lengths = Int[Array, " b"]  # how many of the first keys of each example are real


def attend(
    query: Float[Array, "#b q h d"],
    key: Float[Array, "b k h d"],
    value: Float[Array, "b k h d"],
    mask: Mask | Lengths | None = None,
    *,
    causal: bool = False,
) -> Float[Array, "b q h d"]:
    """softmax(query key^T / sqrt(d)) value (Vaswani et al., 2017, arXiv:1706.03762).

    `mask` is true where a query may attend, or is added to the logits, or is ALiBi's slopes, or is
    how many of each example's first keys are real. The softmax is float32. The implementation is
    chosen at lowering, so that planning for a TPU on a CPU host uses the TPU's. TPUs and NVIDIA
    GPUs use a fused kernel for arrays that it supports.
    """
    if isinstance(mask, Alibi) or (mask is not None and jnp.issubdtype(mask.dtype, jnp.floating)):
        return _attend_unfused(query, key, value, mask, causal=causal)
    dense = functools.partial(jax.nn.dot_product_attention, is_causal=causal)
    implementations = {
        "cpu": functools.partial(attend_in_parts, causal=causal),
        "default": lambda query, key, value, mask: dense(query, key, value, mask=mask),
    }
    given, mask, mesh = mask, _by_key(mask, key), mesh_of(query)
    capability = cuda_attention.compute_capability()
    if capability >= cuda_attention.MIN_COMPUTE_CAPABILITY and cuda_attention.fits(
        query, key, given, causal=causal
    ):
        kernel = functools.partial(cuda_attention.attend, causal=causal)
        kernel = _on_each_device(kernel, mesh, query.shape, mask is not None)
        implementations["cuda"] = lambda query, key, value, _: kernel(query, key, value, given)
    if mesh is not None and tpu_attention.fits(query, key, mask) and tpu_attention.runs_on(mesh):
        implementations["tpu"] = _sharded_kernel(mesh, query.shape, mask is not None, causal)
    return lax.platform_dependent(query, key, value, mask, **implementations)


def _attend_unfused(query, key, value, mask, **options):
    """Attend where there is no fused kernel: in parts on a CPU, else at once."""
    return lax.platform_dependent(
        query,
        key,
        value,
        mask,
        cpu=functools.partial(attend_in_parts, **options),
        default=functools.partial(attend_at_once, **options),
    )


def _by_key(mask: Array | None, key: Array) -> Array | None:
    """Return lengths as a mask over keys; other masks as they are."""
    if mask is None or mask.ndim == 4:
        return mask
    return (jnp.arange(key.shape[1]) < mask[:, None])[:, None, None]


def _sharded_kernel(mesh: AbstractMesh, shape: tuple[int, ...], masked: bool, causal: bool):
    """Run the TPU kernel on each device's examples and heads.

    The kernel takes the arrays as the projections write them. With a separate axis of heads on the
    mesh, XLA would choose a layout for it and copy.
    """
    b, n, heads, d = shape
    kernel = functools.partial(
        tpu_attention.attend,
        heads=heads // _head_ways(mesh, heads),
        causal=causal,
        vmem=tpu_attention.vmem_on(mesh),
    )
    kernel = _on_each_device(kernel, mesh, shape, masked)

    def attend_flat(query, key, value, mask):
        query, key, value = (x.reshape(b, n, heads * d) for x in (query, key, value))
        return kernel(query, key, value, mask).reshape(shape)

    return attend_flat


def _on_each_device(
    kernel: Callable, mesh: AbstractMesh | None, shape: tuple[int, ...], masked: bool
) -> Callable:
    """Map a kernel over the devices of a mesh, by examples and heads (the third axis).

    XLA cannot partition the TPU kernel, nor cuDNN's attention where `jax.shard_map` maps `data`.
    """
    if mesh is None:
        return kernel
    b, _, heads, _ = shape
    examples = free_batch_axes(mesh) if b % batch_ways(mesh) == 0 else None
    rows = P(examples, None, "tensor" if _head_ways(mesh, heads) > 1 else None)
    return jax.shard_map(
        kernel,
        mesh=mesh,
        axis_names={*free_batch_axes(mesh), "tensor"},
        in_specs=(rows, rows, rows, P(examples) if masked else P()),
        out_specs=rows,
        check_vma=False,
    )


def _head_ways(mesh: AbstractMesh, heads: int) -> int:
    """Number of parts that the heads are sharded into."""
    return mesh.shape["tensor"] if heads % mesh.shape["tensor"] == 0 else 1


def attend_captured(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b k h d"],
    value: Float[Array, "b k h d"],
    mask: Mask | Lengths | None = None,
    *,
    causal: bool = False,
    softcap: float | None = None,
    intermediates: Intermediates | None = None,
) -> Float[Array, "b q h d"]:
    """`attend`; with `intermediates`, capture the weights "attention".

    `softcap` bounds the logits to that size. Both need an implementation without a fused kernel.
    """
    if intermediates is None and softcap is None:
        return attend(query, key, value, mask, causal=causal)
    mask = mask if isinstance(mask, Alibi) else _by_key(mask, key)
    options: dict = {"causal": causal, "softcap": softcap}
    if intermediates is None:
        return _attend_unfused(query, key, value, mask, **options)
    return attend_at_once(query, key, value, mask, intermediates=intermediates, **options)


class Attention(nnx.Module):
    """Multi-head attention: projections of shape (width, heads, head_dim) and back.

    The context may have another width, `context_width`, and the result `output_width`. With
    `norm_eps`, the attention output is normalised before the output projection. With `qk_norm_eps`,
    queries and keys have an RMSNorm over all heads (arXiv:2302.05442). `softcap` bounds the logits,
    as in Gemma 2 (arXiv:2408.00118).

    Example:
        >>> from flax import nnx
        >>> attention = vlm.nn.Attention(16, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
        >>> attention(jnp.ones((2, 5, 16))).shape
        (2, 5, 16)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        context_width: int | None = None,
        output_width: int | None = None,
        key_bias: bool = True,
        norm_eps: float | None = None,
        qk_norm_eps: float | None = None,
        softcap: float | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.softcap = softcap
        init = nnx.initializers.xavier_uniform()
        project = functools.partial(nnx.LinearGeneral, kernel_init=init, dtype=dtype, rngs=rngs)
        split = (heads, width // heads)
        self.query = project(width, split)
        self.key = project(context_width or width, split, use_bias=key_bias)
        self.value = project(context_width or width, split)
        normed = qk_norm_eps is not None
        self.query_norm = RMSNorm(width, qk_norm_eps, rngs=rngs) if normed else None
        self.key_norm = RMSNorm(width, qk_norm_eps, rngs=rngs) if normed else None
        self.norm = None if norm_eps is None else LayerNorm(width, norm_eps, rngs=rngs)
        self.out = project(split, output_width or width, axis=(-2, -1))

    @auto_axes
    def __call__(
        self,
        x: Float[Array, "#b q d"],
        context: Float[Array, "b k c"] | None = None,
        mask: Mask | Lengths | None = None,
        *,
        causal: bool = False,
        rotation: Rotation | None = None,
        intermediates: Intermediates | None = None,
    ) -> Float[Array, "b q e"]:
        """Attend from the tokens of `x` to those of `context`, by default `x` itself.

        `intermediates` capture the weights "attention", (b, h, q, k), without a fused kernel.
        """
        context = x if context is None else context
        # A key bias adds a constant to all logits of a query, so it cancels in the softmax. Its
        # gradient is rounding noise, which Adafactor and Lion would scale up, so it gets none.
        # With rotary positions, a norm of the keys or a soft cap, the key bias does matter.
        cancels = rotation is None and self.key_norm is None and self.softcap is None
        query, key, value = (
            checkpoint_name(linear(layer, tokens, fixed_bias=fixed), PROJECTED)
            for layer, tokens, fixed in (
                (self.query, x, False),
                (self.key, context, cancels),
                (self.value, context, False),
            )
        )
        query = query if self.query_norm is None else self.query_norm(query)
        key = key if self.key_norm is None else self.key_norm(key)
        heads, head_dim = self.query.kernel.shape[-2:]
        query, key, value = (y.reshape(*y.shape[:2], heads, head_dim) for y in (query, key, value))
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        options: dict = {"causal": causal, "softcap": self.softcap, "intermediates": intermediates}
        y = attend_captured(query, key, value, mask, **options)
        y = checkpoint_name(y.reshape(*x.shape[:2], -1), ATTENDED)
        return linear(self.out, y if self.norm is None else self.norm(y))
