"""Multi-head attention, with the fastest implementation for each platform."""

import functools
import re

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vlm.nn import tpu_attention
from vlm.nn.auto_axes import auto_axes
from vlm.nn.cpu_attention import Mask, attend_in_parts
from vlm.nn.intermediates import Intermediates
from vlm.nn.layers import LayerNorm, RMSNorm, linear
from vlm.nn.positions import Rotation, rotate
from vlm.nn.remat import ATTENDED, PROJECTED
from vlm.sharding import batch_ways, free_batch_axes, mesh_of


def attend(
    query: Float[Array, "#b q h d"],
    key: Float[Array, "b k h d"],
    value: Float[Array, "b k h d"],
    mask: Mask | None = None,
    *,
    causal: bool = False,
) -> Float[Array, "b q h d"]:
    """softmax(query key^T / sqrt(d)) value (Vaswani et al., 2017, arXiv:1706.03762).

    `mask` is true where a query may attend, or is added to the logits. The softmax is float32. The
    implementation is chosen at lowering, so that planning for a TPU on a CPU host uses the TPU's.
    TPUs and NVIDIA GPUs use a fused kernel for arrays that it supports.
    """
    if mask is not None and mask.dtype != bool:  # for which there is no fused kernel
        return attend_in_parts(query, key, value, mask, causal=causal)
    dense = functools.partial(jax.nn.dot_product_attention, is_causal=causal)
    implementations = {
        "cpu": functools.partial(attend_in_parts, causal=causal),
        "default": lambda query, key, value, mask: dense(query, key, value, mask=mask),
    }
    mesh = mesh_of(query)
    if mesh is not None and tpu_attention.fits(query, key, mask) and tpu_attention.runs_on(mesh):
        implementations["tpu"] = _sharded_kernel(mesh, query.shape, mask is not None, causal)
    if mask is None and query.shape == key.shape and _cudnn_takes(query):
        implementations["cuda"] = lambda query, key, value, mask: _at_even_length(
            dense, query, key, value
        )
    return lax.platform_dependent(query, key, value, mask, **implementations)


def _sharded_kernel(mesh: AbstractMesh, shape: tuple[int, ...], masked: bool, causal: bool):
    """Run the TPU kernel on each device's examples and heads, since XLA cannot partition it.

    The kernel takes the arrays as the projections write them. With a separate axis of heads on the
    mesh, XLA would choose a layout for it and copy.
    """
    b, n, heads, d = shape
    examples = free_batch_axes(mesh) if b % batch_ways(mesh) == 0 else None
    ways = mesh.shape["tensor"] if heads % mesh.shape["tensor"] == 0 else 1
    rows = P(examples, None, "tensor" if ways > 1 else None)
    kernel = jax.shard_map(
        functools.partial(
            tpu_attention.attend,
            heads=heads // ways,
            causal=causal,
            vmem=tpu_attention.vmem_on(mesh),
        ),
        mesh=mesh,
        axis_names={*free_batch_axes(mesh), "tensor"},
        in_specs=(rows, rows, rows, P(examples) if masked else P()),
        out_specs=rows,
        check_vma=False,
    )

    def attend_flat(query, key, value, mask):
        query, key, value = (x.reshape(b, n, heads * d) for x in (query, key, value))
        return kernel(query, key, value, mask).reshape(shape)

    return attend_flat


def _at_even_length(attention, query, key, value, implementation="cudnn"):
    """Self-attention by cuDNN, padded to the even length that its backward pass needs."""
    b, n = query.shape[:2]
    if n % 2 == 0:
        return attention(query, key, value, implementation=implementation)
    query, key, value = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (query, key, value))
    real = {"query_seq_lengths": jnp.full(b, n), "key_value_seq_lengths": jnp.full(b, n)}
    return attention(query, key, value, **real, implementation=implementation)[:, :n]


def _cudnn_takes(query: Array) -> bool:
    """Whether cuDNN attention runs here (Ampere or later) and supports these arrays."""
    if query.dtype not in (jnp.bfloat16, jnp.float16) or query.shape[1] < 2:
        return False
    if query.shape[-1] % 8 or query.shape[-1] > 128 or jax.default_backend() != "gpu":
        return False
    generation = getattr(jax.devices()[0], "compute_capability", "0")  # not a number for AMD
    return re.fullmatch(r"\d+\.\d+", generation) is not None and float(generation) >= 8


def attend_captured(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b k h d"],
    value: Float[Array, "b k h d"],
    mask: Mask | None = None,
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
    options: dict = {"causal": causal, "softcap": softcap, "intermediates": intermediates}
    return attend_in_parts(query, key, value, mask, **options)


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
        mask: Mask | None = None,
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
        # With rotary positions or a norm of the keys, the key bias does matter.
        query, key, value = (
            checkpoint_name(linear(layer, tokens, fixed_bias=fixed), PROJECTED)
            for layer, tokens, fixed in (
                (self.query, x, False),
                (self.key, context, rotation is None and self.key_norm is None),
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
