"""Pooling of a token sequence to one vector."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from vlm.config import Activation, ImportPath, MlpKind, TextPool
from vlm.nn.attention import Attention, attend_captured
from vlm.nn.auto_axes import auto_axes
from vlm.nn.intermediates import Intermediates
from vlm.nn.layers import LayerNorm, Linear, Mlp, linear


class MapPool(nnx.Module):
    """Multi-head attention pooling: one learned probe attends to all tokens (arXiv:2106.04560).

    Its MLP is of the given `kind`. With `add_to_first`, the MLP's output is added to the first
    token in place of the attention's output, as in nomic-embed-vision (arXiv:2406.18587).

    Example:
        >>> from flax import nnx
        >>> options = {"act": "gelu", "norm_eps": 1e-6, "dtype": jnp.float32, "rngs": nnx.Rngs(0)}
        >>> vlm.nn.MapPool(16, 2, 32, **options)(jnp.ones((2, 5, 16))).shape
        (2, 16)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_dim: int,
        *,
        act: Activation | ImportPath,
        kind: MlpKind = "plain",
        add_to_first: bool = False,
        norm_eps: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.add_to_first = add_to_first
        init = nnx.initializers.xavier_uniform()
        self.probe = nnx.Param(init(rngs.params(), (1, width)))
        self.attention = Attention(width, heads, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(width, norm_eps, rngs=rngs)
        self.mlp = Mlp(width, mlp_dim, act, kind=kind, dtype=dtype, rngs=rngs)

    @auto_axes
    def __call__(
        self,
        x: Float[Array, "b n d"],
        mask: Bool[Array, "b n"] | None = None,
        *,
        intermediates: Intermediates | None = None,
    ) -> Float[Array, "b d"]:
        probe = jnp.broadcast_to(self.probe[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        mask = None if mask is None else mask[:, None, None, :]
        y = self.attention(probe, x, mask, intermediates=intermediates)
        y = (x[:, :1] if self.add_to_first else y) + self.mlp(self.norm(y))
        return y[:, 0]


class QueryPool(nnx.Module):
    """CoCa's attentional pooler, reduced to its first query.

    (Yu et al., 2022, arXiv:2205.01917, as open_clip has it.)

    Example:
        >>> from flax import nnx
        >>> pool = vlm.nn.QueryPool(16, 8, 2, norm_eps=1e-5, dtype=jnp.float32, rngs=nnx.Rngs(0))
        >>> pool(jnp.ones((2, 5, 16))).shape
        (2, 8)
    """

    def __init__(
        self,
        width: int,
        embed_dim: int,
        heads: int,
        *,
        norm_eps: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.query = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (embed_dim,)))
        self.query_norm = LayerNorm(embed_dim, norm_eps, rngs=rngs)
        self.context_norm = LayerNorm(width, norm_eps, rngs=rngs)
        self.attention = Attention(embed_dim, heads, context_width=width, dtype=dtype, rngs=rngs)

    @auto_axes
    def __call__(
        self, x: Float[Array, "b n d"], *, intermediates: Intermediates | None = None
    ) -> Float[Array, "b e"]:
        query = self.query_norm(self.query[...].astype(x.dtype))
        query = jnp.broadcast_to(query, (x.shape[0], 1, query.shape[-1]))
        return self.attention(query, self.context_norm(x), intermediates=intermediates)[:, 0]


class ProbePool(nnx.Module):
    """Attention pooling whose learned query is not projected (AIMv2, arXiv:2411.14402).

    Example:
        >>> from flax import nnx
        >>> pool = vlm.nn.ProbePool(16, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
        >>> pool(jnp.ones((2, 5, 16))).shape
        (2, 16)
    """

    def __init__(self, width: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        init = nnx.initializers.xavier_uniform()
        project = functools.partial(nnx.LinearGeneral, kernel_init=init, dtype=dtype, rngs=rngs)
        self.probe = nnx.Param(init(rngs.params(), (heads, width // heads)))
        self.key = project(width, (heads, width // heads))
        self.value = project(width, (heads, width // heads))
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)

    @auto_axes
    def __call__(
        self, x: Float[Array, "b n d"], *, intermediates: Intermediates | None = None
    ) -> Float[Array, "b d"]:
        shape = (*x.shape[:2], *self.probe.shape)
        query = jnp.broadcast_to(self.probe[...].astype(x.dtype), (len(x), 1, *self.probe.shape))
        key = linear(self.key, x, fixed_bias=True).reshape(shape)
        value = linear(self.value, x).reshape(shape)
        y = attend_captured(query, key, value, intermediates=intermediates)
        return self.out(y.reshape(x.shape[0], -1))


def mean_pool(
    x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None
) -> Float[Array, "b d"]:
    """Mean of the tokens, excluding masked ones."""
    if mask is None:
        return x.mean(1)
    weights = mask[..., None].astype(x.dtype)
    return (x * weights).sum(1) / jnp.maximum(weights.sum(1), 1)


def max_pool(
    x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None
) -> Float[Array, "b d"]:
    """Maximum of the tokens, excluding masked ones."""
    return x.max(1) if mask is None else jnp.where(mask[..., None], x, -jnp.inf).max(1)


def token_pool(x: Float[Array, "b n d"], position: Int[Array, " b"]) -> Float[Array, "b d"]:
    """Token at one position of each sequence."""
    return jnp.take_along_axis(x, position[:, None, None], axis=1)[:, 0]


def _one_token(position: Callable) -> Callable:
    def pool(x, norm, tokens, real, config):
        return norm(token_pool(x, position(tokens, config)))

    return pool


# Poolings of a text without parameters: from the vectors x, the tower's norm, the token ids, the
# mask of real tokens (None: all) and the tower's config to one vector for each text.
TEXT_POOLS: dict[TextPool, Callable] = {
    "end": _one_token(lambda tokens, config: jnp.argmax(tokens == config.end_id, axis=1)),
    "argmax": _one_token(lambda tokens, config: jnp.argmax(tokens, axis=1)),
    "first": lambda x, norm, tokens, real, config: norm(x[:, 0]),
    "last": lambda x, norm, tokens, real, config: norm(x[:, -1]),
    "appended": lambda x, norm, tokens, real, config: norm(x[:, -1]),
    "class": lambda x, norm, tokens, real, config: norm(x[:, -1]),
    "mean": lambda x, norm, tokens, real, config: mean_pool(norm(x), real),
    "max": lambda x, norm, tokens, real, config: max_pool(norm(x), real),
}


def map_pool_flops(width: int, mlp_dim: int, tokens: int, *, gated: bool = False) -> float:
    """FLOPs of attention pooling: one query, keys and values of all tokens, and an MLP."""
    attention = 2 * (2 * width**2 + 2 * tokens * width**2 + 2 * tokens * width)
    return attention + 2 * (3 if gated else 2) * width * mlp_dim


def probe_pool_flops(width: int, tokens: int) -> float:
    """FLOPs of pooling by an unprojected probe: keys, values, attention and an output layer."""
    return 2 * (2 * tokens * width**2 + 2 * tokens * width + width**2)


def query_pool_flops(width: int, embed_dim: int, tokens: int) -> float:
    """FLOPs of CoCa's attentional pooler."""
    keys_and_values = 2 * tokens * width * embed_dim
    return 2 * (2 * embed_dim**2 + keys_and_values + 2 * tokens * embed_dim)
