"""Text tower: a transformer over token ids."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, Key

from vlm.config import EncoderTextConfig, TextConfig, TextTowerConfig
from vlm.models.projection import map_pool, projection, projection_flops
from vlm.nn.auto_axes import auto_axes
from vlm.nn.intermediates import Intermediates, capture, part
from vlm.nn.layers import NORMS, Linear
from vlm.nn.pooling import TEXT_POOLS, map_pool_flops
from vlm.nn.positions import alibi, sinusoids, token_rotation
from vlm.nn.transformer import Execution, Transformer, block_flops

LENGTH_STEP = 16  # tokens: lengths of causal text are rounded up to a multiple of this


class TextTower(nnx.Module):
    """Map token ids to embeddings of `embed_dim` dimensions (not unit norm).

    Example:
        >>> model.model.text(jnp.ones((2, 12), jnp.int32)).shape
        (2, 16)
    """

    def __init__(self, config: TextConfig, embed_dim: int, *, execution: Execution, rngs: nnx.Rngs):
        c, dtype = config, execution.dtype
        self.config = config
        self.dtype = dtype
        table, position = nnx.initializers.normal(0.02), nnx.initializers.normal(0.01)
        self.embedding = nnx.Param(table(rngs.params(), (c.vocab_size, c.width)))
        has_class = c.pool in ("class", "appended")
        self.class_token = nnx.Param(position(rngs.params(), (c.width,))) if has_class else None
        count = c.context_length + (c.pool == "class")
        learned = c.positions == "learned"
        self.position = nnx.Param(position(rngs.params(), (count, c.width))) if learned else None
        post = c.norm == "post"
        norm, first = NORMS[c.norm_kind], post or c.embedding_norm
        self.embedding_norm = norm(c.width, c.norm_eps, rngs=rngs) if first else None
        self.transformer = Transformer(
            c.width,
            c.depth,
            c.heads,
            c.mlp_dim,
            act=c.activation,
            norm_eps=c.norm_eps,
            dropout_rate=c.dropout,
            causal=c.causal,
            layer_scale=c.layer_scale,
            norm=c.norm,
            norm_kind=c.norm_kind,
            mlp=c.mlp,
            softcap=c.softcap,
            execution=execution,
            rngs=rngs,
        )
        last = not post or c.last_norm
        self.norm = norm(c.width, c.norm_eps, rngs=rngs) if last else None
        self.pool = map_pool(c, dtype=dtype, rngs=rngs) if c.pool == "map" else None
        self.pooler = Linear(c.width, c.width, dtype=dtype, rngs=rngs) if c.pooler else None
        self.projection = projection(c, c.width, embed_dim, dtype=dtype, rngs=rngs)

    @auto_axes
    def __call__(
        self,
        tokens: Int[Array, "b n"],
        *,
        keys: Key[Array, " b"] | None = None,
        context: tuple[Float[Array, "b k d"], Int[Array, "b k"]] | None = None,
        intermediates: Intermediates | None = None,
    ) -> Float[Array, "b e"]:
        """Embed texts; `keys`, one per example, turn dropout on.

        `context` is vectors and their positions: they replace token embeddings there, while masks
        and pooling still use the tokens (CoOp, arXiv:2109.01134). `intermediates` capture
        "embedding", the activations of the stack, and "pool/attention" of a map pool.
        """
        x, real = self._tokens(tokens, keys, context, intermediates)
        return self._embedding(x, tokens, real, intermediates)

    @auto_axes
    def dense(self, tokens: Int[Array, "b n"]) -> Float[Array, "b n e"]:
        """Embed each token by its own activations in place of the pooled ones, padding too."""
        x, _ = self._tokens(tokens, None, None, None)
        x = x[:, : tokens.shape[1]].reshape(-1, 1, x.shape[-1])
        return self._embedding(x, tokens.reshape(-1, 1), None).reshape(*tokens.shape, -1)

    def _tokens(self, tokens, keys, context, intermediates: Intermediates | None):
        """Run the blocks; return activations, and a mask of real tokens if the tower has one."""
        c = self.config
        x = self.embedding[...].astype(self.dtype)[tokens]
        if context is not None:
            vectors, places = context
            x = x.at[jnp.arange(len(x))[:, None], places].set(vectors.astype(self.dtype))
        x = x * c.width**0.5 if c.scale_embedding else x
        x = capture(intermediates, "embedding", x)
        real = None if c.pad_id is None else tokens != c.pad_id  # (b, n)
        if self.class_token is not None and c.pool == "class":
            last = self.class_token[...].astype(self.dtype)
            x = jnp.concatenate([x, jnp.broadcast_to(last, (x.shape[0], 1, len(last)))], axis=1)
            if real is not None:
                # CoCa's weights were trained with the mask shifted right by one.
                real = jnp.pad(real, ((0, 0), (1, 0)), constant_values=True)
        if self.position is not None:
            x = x + self.position[...].astype(self.dtype)[: x.shape[1]]
        elif c.positions == "sinusoidal":
            x = x + sinusoids(x.shape[1], c.width).astype(self.dtype)
        if self.class_token is not None and c.pool == "appended":
            last = self.class_token[...].astype(self.dtype)
            last = last * c.width**0.5 if c.scale_embedding else last
            x = jnp.concatenate([x, jnp.broadcast_to(last, (x.shape[0], 1, len(last)))], axis=1)
            real = None if real is None else jnp.pad(real, ((0, 0), (0, 1)), constant_values=True)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        mask, rotation = None if real is None else real[:, None, None, :], None
        if c.positions == "rotary":
            rotation = token_rotation(x.shape[1], c.width // c.heads, c.rotary_base)
        elif c.positions == "alibi":
            mask = alibi(c.heads, mask)
        options = {"keys": keys, "rotation": rotation, "intermediates": intermediates}
        return self.transformer(x, mask, **options), real

    def _embedding(self, x, tokens, real, intermediates: Intermediates | None = None):
        """Pool and project tokens."""
        c = self.config
        norm = self.norm or (lambda x: x)  # post-norm blocks end with a norm
        if self.pool is not None:
            x = self.pool(norm(x), real, intermediates=part(intermediates, "pool"))
        else:
            x = TEXT_POOLS[c.pool](x, norm, tokens, real, c)
        x = x if self.pooler is None else jnp.tanh(self.pooler(x))
        return x if self.projection is None else self.projection(x)


def text_flops(config: TextConfig, embed_dim: int, *, masking: float = 0.0) -> dict[str, float]:
    """Forward FLOPs of one text, by part: projections, scores, mlp, pool, projection.

    `masking` is the fraction of tokens that training drops.
    """
    c, tokens = config, config.tokens(masking=masking)
    pool = map_pool_flops(c.width, c.mlp_dim, tokens) if c.pool == "map" else 0.0
    return {
        **block_flops(c, tokens, gated=c.mlp != "plain"),
        "pool": pool + 2 * c.width**2 * c.pooler,
        "projection": projection_flops(c, c.width, embed_dim),
    }


def used_lengths(
    tokens: Int32[np.ndarray, "n l"], config: TextTowerConfig
) -> Int[np.ndarray, " n"] | None:
    """Return the number of first tokens of each text that its embedding depends on.

    A causal tower ignores tokens after the pooled one, and a tower with a mask ignores padding.
    None: other towers depend on all tokens.
    """
    if not isinstance(config, TextConfig | EncoderTextConfig) or not config.ignores_padding:
        return None
    last = np.zeros(len(tokens), int)
    if isinstance(config, TextConfig) and config.pool in ("end", "argmax"):
        last = np.argmax(tokens == config.end_id if config.pool == "end" else tokens, axis=1)
        if config.causal:
            return last + 1
    real = tokens != config.pad_id
    last_real = tokens.shape[1] - 1 - np.argmax(real[:, ::-1], axis=1)
    return np.maximum(last, np.where(real.any(1), last_real, 0)) + 1


def shortened(
    tokens: Int32[np.ndarray, "n l"], config: TextTowerConfig, step: int = LENGTH_STEP
) -> Int32[np.ndarray, "n m"]:
    """Cut common padding that does not affect the result, to one of a few lengths.

    A causal tower ignores tokens after the pooled one: lengths are multiples of `step`. A tower
    that masks its padding (BERT) ignores padding at the end: lengths are `step` times a power of
    two, since its texts may be long. For other towers rows stay complete.
    """
    lengths = used_lengths(tokens, config)
    if lengths is None or not len(lengths):
        return tokens
    last = int(lengths.max())
    if isinstance(config, TextConfig) and config.causal and config.pool in ("end", "argmax"):
        return tokens[:, : -(-last // step) * step]
    while step > 1 and step < last:
        step *= 2
    return tokens[:, : max(step, last)]
