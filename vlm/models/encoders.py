"""Text encoders without a table of positions: ModernBERT (arXiv:2412.13663), T5 (arXiv:1910.10683).

The encoder of multilingual T5 (arXiv:2010.11934) is T5's.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from vlm.config import EncoderTextConfig
from vlm.models.projection import projection, projection_flops
from vlm.nn.auto_axes import auto_axes
from vlm.nn.intermediates import Intermediates, capture
from vlm.nn.layers import RMSNorm, dropout, gelu, gelu_tanh, linear, split_keys
from vlm.nn.pooling import max_pool, mean_pool
from vlm.nn.positions import Rotation, rotate, token_rotation
from vlm.nn.transformer import Execution, scan_layers, stack_blocks


class EncoderTower(nnx.Module):
    """Map token ids to embeddings of `embed_dim` dimensions (not unit norm)."""

    def __init__(
        self, config: EncoderTextConfig, embed_dim: int, *, execution: Execution, rngs: nnx.Rngs
    ):
        c, table = config, nnx.initializers.normal(0.02)
        self.config, self.dtype = config, execution.dtype
        self.embedding = nnx.Param(table(rngs.params(), (c.vocab_size, c.width)))
        rotary = c.positions == "rotary"
        self.embedding_norm = _norm(c, rngs) if rotary else None
        shape = (c.buckets, c.heads)
        self.relative_position_bias = None if rotary else nnx.Param(table(rngs.params(), shape))
        self.transformer = Blocks(c, execution=execution, rngs=rngs)
        self.norm = _norm(c, rngs)
        self.projection = projection(c, c.width, embed_dim, dtype=execution.dtype, rngs=rngs)

    @auto_axes
    def __call__(
        self,
        tokens: Int[Array, "b n"],
        *,
        keys: Key[Array, " b"] | None = None,
        intermediates: Intermediates | None = None,
    ) -> Float[Array, "b e"]:
        """Embed texts; `keys`, one per example, turn dropout on.

        `intermediates` capture "embedding".
        """
        c = self.config
        x = capture(intermediates, "embedding", self.embedding[...].astype(self.dtype)[tokens])
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        real = tokens != c.pad_id
        bias = None
        if self.relative_position_bias is not None:
            ranges = distance_ranges(tokens.shape[1], c.buckets, c.max_distance)
            bias = self.relative_position_bias[...][ranges].transpose(
                2, 0, 1
            )  # (heads, queries, keys)
        x = self.norm(self.transformer(x, real, bias, keys))
        pools = {"first": lambda x, real: x[:, 0], "mean": mean_pool, "max": max_pool}
        x = pools[c.pool](x, real)
        return x if self.projection is None else self.projection(x)


class CentredNorm(RMSNorm):
    """LayerNorm without a bias."""

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        wide = x.astype(jnp.float32)
        return super().__call__(wide - wide.mean(-1, keepdims=True)).astype(x.dtype)


def _norm(config: EncoderTextConfig, rngs: nnx.Rngs) -> RMSNorm:
    kind = CentredNorm if config.positions == "rotary" else RMSNorm
    return kind(config.width, config.norm_eps, rngs=rngs)


class Blocks(nnx.Module):
    """The stacked blocks, one `lax.scan`."""

    def __init__(self, config: EncoderTextConfig, *, execution: Execution, rngs: nnx.Rngs):
        def block(rngs: nnx.Rngs) -> Block:
            return Block(config, dtype=execution.dtype, rngs=rngs)

        self.blocks = stack_blocks(block, config.depth, rngs)
        self.config, self.execution = config, execution

    def __call__(
        self,
        x: Float[Array, "b n d"],
        real: Bool[Array, "b n"],
        bias: Float[Array, "h n n"] | None,
        keys: Key[Array, " b"] | None,
    ) -> Float[Array, "b n d"]:
        c, places = self.config, jnp.arange(x.shape[1])
        block, parameters = nnx.split(self.blocks)
        near = jnp.abs(places[:, None] - places) <= c.window
        rotations = [token_rotation(x.shape[1], c.head_dim, base) for base in c.rotary_bases]

        def layer(x, numbered):
            number, parameters = numbered
            layer_keys = keys
            if keys is not None:
                layer_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            mask, turn = real[:, None, None], None
            if bias is None:
                wide = number % c.global_every == 0
                mask = mask & (near | wide)
                turn = tuple(jnp.where(wide, *both) for both in zip(*rotations, strict=True))
            own = nnx.merge(block, parameters)
            return own(x, mask, bias, turn, number == 0, layer_keys), None

        layers = (jnp.arange(c.depth), nnx.to_pure_dict(parameters))
        return scan_layers(layer, x, layers, self.execution)[0]


class Block(nnx.Module):
    """Block of attention and a gated MLP, with norms before both."""

    def __init__(self, config: EncoderTextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c, split, self.config = config, (config.heads, config.head_dim), config
        init = nnx.initializers.xavier_uniform()
        options = {"use_bias": False, "kernel_init": init, "dtype": dtype, "rngs": rngs}
        self.attention_norm = _norm(c, rngs)
        self.attention = nnx.Dict(
            query=nnx.LinearGeneral(c.width, split, **options),
            key=nnx.LinearGeneral(c.width, split, **options),
            value=nnx.LinearGeneral(c.width, split, **options),
            out=nnx.LinearGeneral(split, c.width, axis=(-2, -1), **options),
        )
        self.mlp_norm = _norm(c, rngs)
        self.mlp = nnx.Dict(
            gate=nnx.Linear(c.width, c.mlp_dim, **options),
            up=nnx.Linear(c.width, c.mlp_dim, **options),
            down=nnx.Linear(c.mlp_dim, c.width, **options),
        )

    def __call__(
        self,
        x: Float[Array, "b n d"],
        mask: Bool[Array, "b 1 #n n"],
        bias: Float[Array, "h n n"] | None,
        rotation: Rotation | None,
        first: Bool[Array, ""],
        keys: Key[Array, " b"] | None,
    ) -> Float[Array, "b n d"]:
        c, (attention_keys, mlp_keys) = self.config, split_keys(keys)
        y = self.attention_norm(x)
        if rotation is not None:  # the embeddings have a norm of their own
            y = jnp.where(first, x, y)
        query, key, value = (
            linear(self.attention[name], y).reshape(*y.shape[:2], c.heads, c.head_dim)
            for name in ("query", "key", "value")
        )
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        logits = logits * c.head_dim**-0.5 if bias is None else logits + bias
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        y = linear(self.attention["out"], y.reshape(*y.shape[:2], -1))
        x = x + dropout(y, c.dropout, attention_keys)
        y = self.mlp_norm(x)
        act = gelu if rotation is not None else gelu_tanh
        hidden = act(linear(self.mlp["gate"], y)) * linear(self.mlp["up"], y)
        return x + dropout(linear(self.mlp["down"], hidden), c.dropout, mlp_keys)


def distance_ranges(count: int, buckets: int, max_distance: int) -> Int[np.ndarray, "n n"]:
    """Range of the distance from each query to each key: single distances, then ever wider ones."""
    places = np.arange(count)
    offset = places[None] - places[:, None]  # of the key from the query
    half, near = buckets // 2, buckets // 4
    distance = np.abs(offset)
    with np.errstate(divide="ignore"):
        steps = np.log(distance.astype(np.float32) / near) / np.float32(
            math.log(max_distance / near)
        )
        far = near + np.where(distance < near, 0, steps * (half - near)).astype(int)
    ranges = np.where(distance < near, distance, np.minimum(far, half - 1))
    return ranges + half * (offset > 0)


def flops(config: EncoderTextConfig, embed_dim: int, *, masking: float = 0.0) -> dict[str, float]:
    """Forward FLOPs of one text, by part: projections, scores, mlp, projection."""
    c, tokens = config, config.tokens(masking=masking)
    inner = c.heads * c.head_dim
    return {
        "projections": c.depth * 2 * tokens * 4 * c.width * inner,
        "scores": c.depth * 2 * 2 * tokens**2 * inner,
        "mlp": c.depth * 2 * tokens * 3 * c.width * c.mlp_dim,
        "projection": projection_flops(c, c.width, embed_dim),
    }
