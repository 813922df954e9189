"""Vision Transformer (arXiv:2010.11929), with the variants of public models."""

from dataclasses import replace
from typing import assert_never

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from vlm.config import ViTConfig
from vlm.errors import ConfigError
from vlm.models.projection import map_pool, projection, projection_flops
from vlm.models.qformer import QFormer, qformer_flops
from vlm.nn.auto_axes import auto_axes
from vlm.nn.intermediates import Intermediates, capture, part
from vlm.nn.layers import NORMS, Linear, split_keys
from vlm.nn.naflex import Patches
from vlm.nn.patches import ConvStem, NestedStem, PatchStem, drop_patches, drop_real_patches
from vlm.nn.pooling import (
    MapPool,
    ProbePool,
    QueryPool,
    map_pool_flops,
    mean_pool,
    probe_pool_flops,
    query_pool_flops,
)
from vlm.nn.positions import grid_rotation
from vlm.nn.transformer import Execution, Transformer, block_flops


class ViTTower(nnx.Module):
    """Map normalised images to embeddings of `embed_dim` dimensions (not unit norm).

    Example:
        >>> model.model.vision(jnp.zeros((2, 16, 16, 3))).shape
        (2, 16)
    """

    def __init__(self, config: ViTConfig, embed_dim: int, *, execution: Execution, rngs: nnx.Rngs):
        c, dtype = config, execution.dtype
        self.config = config
        match c.stem:
            case "linear":
                self.stem = PatchStem(
                    c.patch_size, c.width, bias=c.patch_bias, dtype=dtype, rngs=rngs
                )
            case "conv":
                self.stem = ConvStem(c.stem_widths, c.width, dtype=dtype, rngs=rngs)
            case "nested":
                self.stem = NestedStem(c.patch_size, c.stem_widths, c.width, dtype=dtype, rngs=rngs)
            case _:
                assert_never(c.stem)

        has_class = c.has_class_token
        normal = nnx.initializers.normal(c.width**-0.5)
        self.class_token = nnx.Param(normal(rngs.params(), (c.width,))) if has_class else None
        count = (c.image_size // c.patch_size) ** 2 + has_class
        table = (count, c.width)
        self.position = nnx.Param(normal(rngs.params(), table)) if c.position else None
        registers = (c.registers, c.width)
        self.registers = nnx.Param(normal(rngs.params(), registers)) if c.registers else None

        norm = NORMS[c.norm_kind]
        self.stem_norm = norm(c.width, c.norm_eps, rngs=rngs) if c.stem_norm else None
        self.pre_norm = norm(c.width, c.norm_eps, rngs=rngs) if c.pre_norm else None
        self.transformer = Transformer(
            c.width,
            c.depth,
            c.heads,
            c.mlp_dim,
            act=c.activation,
            norm_eps=c.norm_eps,
            dropout_rate=c.dropout,
            layer_scale=c.layer_scale,
            norm=c.norm,
            norm_kind=c.norm_kind,
            mlp=c.mlp,
            mlp_norm_eps=c.mlp_norm_eps,
            attention_norm=c.attention_norm,
            key_bias=c.key_bias,
            qk_norm=c.qk_norm,
            execution=execution,
            rngs=rngs,
        )
        pooled_width = embed_dim if c.pool == "query" else c.pooled_width
        normed_width = embed_dim if c.pool == "query" else c.width
        self.norm = norm(normed_width, c.norm_eps, rngs=rngs) if c.last_norm else None
        self.head = _head(c, execution, rngs) if c.head_depth else None
        self.head_norm = norm(c.width, c.norm_eps, rngs=rngs) if c.head_depth else None
        heads = c.pool_heads or c.heads
        if c.pool == "query":
            self.pool = QueryPool(
                c.width, embed_dim, heads, norm_eps=c.norm_eps, dtype=dtype, rngs=rngs
            )
        elif c.pool == "probe":
            self.pool = ProbePool(c.width, heads, dtype=dtype, rngs=rngs)
        elif c.qformer is not None:
            self.pool = QFormer(c.qformer, c.width, dtype=dtype, rngs=rngs)
        else:
            has_map = c.pool in ("map", "class_map")
            self.pool = map_pool(c, dtype=dtype, rngs=rngs) if has_map else None
        self.pooler = Linear(c.width, c.width, dtype=dtype, rngs=rngs) if c.pooler else None
        self.projection = projection(c, pooled_width, embed_dim, dtype=dtype, rngs=rngs)

    @auto_axes
    def __call__(
        self,
        images: Float[Array, "b h w 3"] | Patches,
        *,
        keys: Key[Array, " b"] | None = None,
        intermediates: Intermediates | None = None,
    ) -> Float[Array, "b *v e"]:
        """Embed images; `keys`, one per example, turn dropout and patch dropout on.

        With a Q-Former, an image has several vectors.

        `intermediates` capture "stem", the activations of the stack, and "pool/attention".
        """
        x, mask = self._tokens(images, keys, intermediates)
        if self.config.pool == "mean":
            x = x[:, self.config.prefix_tokens :]
        return self._embedding(x, mask, intermediates)

    @auto_axes
    def dense(self, images: Float[Array, "b h w 3"] | Patches) -> Float[Array, "b n e"]:
        """Embed each patch by letting it attend only to itself in the attention pool.

        So its own value is projected (MaskCLIP, arXiv:2112.01071). For class-token towers, this
        replaces the attention of the last block. The vectors of a Q-Former are its own.
        """
        if self.config.pool == "qformer":
            return self(images)
        if self.config.pool == "class_mean":
            raise ConfigError(
                "a patch has no embedding of its own in a tower whose embedding is its class token "
                "beside the mean of its patches (dino.txt): use a tower with another pool"
            )
        intermediates = Intermediates()
        x, _ = self._tokens(images, None, intermediates)
        if self.config.pool == "class":
            before = [intermediates.found["stem"], *intermediates.found["blocks/output"]]
            x = self.transformer.last(before[-2].reshape(-1, 1, x.shape[-1])).reshape(x.shape)
        x = x[:, self.config.prefix_tokens :]
        embeddings = self._embedding(x.reshape(-1, 1, x.shape[-1]))
        return embeddings.reshape(*x.shape[:2], -1)

    def _tokens(
        self, images: Float[Array, "b h w 3"] | Patches, keys, intermediates: Intermediates | None
    ) -> tuple[Float[Array, "b n d"], Bool[Array, "b n"] | None]:
        """Run the blocks; return the tokens, and a mask of real ones for NaFlex."""
        c = self.config
        if isinstance(images, Patches):
            return self._naflex_tokens(images, keys, intermediates)
        patch_keys, block_keys = split_keys(keys)
        x = self.stem(images)
        x = x if self.stem_norm is None else self.stem_norm(x)
        position = None if self.position is None else self.position[...].astype(x.dtype)
        x = x if position is None else x + position[c.has_class_token :]
        x = drop_patches(x, c.patch_dropout, patch_keys)
        parts = []
        if self.class_token is not None:
            token = self.class_token[...].astype(x.dtype)[None]
            parts.append(token if position is None else token + position[:1])
        if self.registers is not None:
            parts.append(self.registers[...].astype(x.dtype))
        if parts:
            prefix = jnp.concatenate(parts)
            x = jnp.concatenate([jnp.broadcast_to(prefix, (x.shape[0], *prefix.shape)), x], axis=1)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        rotation = None
        if c.rotary is not None:
            rotation = grid_rotation(
                c.image_size // c.patch_size,
                c.width // c.heads,
                first=c.rotary,
                before=c.prefix_tokens,
                span=c.rotary_span,
                rows_first=c.rotary_rows_first,
                base=c.rotary_base,
                centred=c.rotary_centred,
            )
        x = capture(intermediates, "stem", x)
        return self.transformer(
            x, keys=block_keys, rotation=rotation, intermediates=intermediates
        ), None

    def _embedding(
        self,
        x: Float[Array, "b n d"],
        mask: Bool[Array, "b n"] | None = None,
        intermediates: Intermediates | None = None,
    ) -> Float[Array, "b *v e"]:
        """Pool and project tokens; for mean pooling, without the class token."""
        c, norm = self.config, self.norm or (lambda x: x)
        match c.pool:
            case "class":
                x = norm(x[:, 0])
                x = x if self.pooler is None else jnp.tanh(self.pooler(x))
            case "query":
                assert isinstance(self.pool, QueryPool)
                x = norm(self.pool(x, intermediates=part(intermediates, "pool")))
            case "mean":
                x = mean_pool(x if c.norm_pooled else norm(x), mask)
                x = norm(x) if c.norm_pooled else x
            case "probe":
                assert isinstance(self.pool, ProbePool)
                x = self.pool(norm(x), intermediates=part(intermediates, "pool"))
            case "class_mean":
                x = norm(x)
                if self.head is not None and self.head_norm is not None:
                    x = self.head_norm(self.head(x))
                x = jnp.concatenate([x[:, 0], x[:, c.prefix_tokens :].mean(1)], axis=-1)
            case "qformer":
                assert isinstance(self.pool, QFormer)
                x = self.pool(norm(x))
            case "map" | "class_map":
                assert isinstance(self.pool, MapPool)
                x = self.pool(norm(x), mask, intermediates=part(intermediates, "pool"))
            case _:
                assert_never(c.pool)
        return x if self.projection is None else self.projection(x)

    def _naflex_tokens(
        self, images: Patches, keys, intermediates: Intermediates | None
    ) -> tuple[Float[Array, "b n d"], Bool[Array, "b n"]]:
        """Run the blocks on images of different shapes, with padding masked in attention."""
        assert isinstance(self.stem, PatchStem)
        assert self.position is not None  # NaFlex has learned positions
        patch_keys, block_keys = split_keys(keys)
        x = self.stem.project(images.pixels.reshape(*images.mask.shape, -1))
        weights = images.rows[..., :, None] * images.columns[..., None, :]
        position = weights.reshape(*images.mask.shape, -1) @ self.position[...]
        x, mask = drop_real_patches(
            x + position.astype(x.dtype), images.mask, self.config.patch_dropout, patch_keys
        )
        x = capture(intermediates, "stem", x)
        lengths = mask.sum(1)  # padding is at the end
        return self.transformer(x, lengths, keys=block_keys, intermediates=intermediates), mask


def _head(c: ViTConfig, execution: Execution, rngs: nnx.Rngs) -> Transformer:
    """Blocks between the norm and the pooling."""
    return Transformer(
        c.width,
        c.head_depth,
        c.heads,
        c.head_mlp_dim or c.mlp_dim,
        act=c.activation,
        norm_eps=c.norm_eps,
        layer_scale=True,
        mlp="swiglu_plain",
        execution=execution,
        rngs=rngs,
    )


def flops(config: ViTConfig, embed_dim: int, *, training: bool = False) -> dict[str, float]:
    """Forward FLOPs of one image, by part: stem, projections, scores, mlp, pool, projection."""
    c = config
    tokens = c.tokens()
    patches = tokens - c.prefix_tokens
    if c.stem == "conv":
        stem, size, channels = 0.0, c.image_size, 3
        for width in c.stem_widths:
            size //= 2
            stem += 2 * size**2 * 9 * channels * width
            channels = width
        stem += 2 * patches * channels * c.width
    elif c.stem == "nested":
        inputs = (3, *c.stem_widths)
        places, taps, stem = patches * 4 ** len(c.stem_widths), 0, 0.0
        for number, width in enumerate((*c.stem_widths, c.width)):
            taps = 4 if number else c.patch_size**2 // 4 ** len(c.stem_widths)
            stem += 2 * places * taps * inputs[number] * width
            places //= 4
    else:
        stem = 2 * patches * c.patch_size**2 * 3 * c.width
        if c.max_patches is not None:  # positions are a product with the position grid
            stem += 2 * patches * (c.image_size // c.patch_size) ** 2 * c.width
    if training:
        tokens = c.tokens(training=True)
    pool = 0.0
    if c.pool in ("map", "class_map"):
        gated = c.pool == "class_map"
        pool = map_pool_flops(c.width, c.pool_mlp_dim or c.mlp_dim, tokens, gated=gated)
    elif c.pool == "query":
        pool = query_pool_flops(c.width, embed_dim, tokens)
    elif c.pool == "probe":
        pool = probe_pool_flops(c.width, tokens)
    elif c.qformer is not None:
        pool = qformer_flops(c.qformer, c.width, tokens)
    elif c.pooler:
        pool = 2 * c.width**2
    elif c.head_depth:
        size = replace(c, depth=c.head_depth, mlp_dim=c.head_mlp_dim or c.mlp_dim)
        pool = sum(block_flops(size, tokens, gated=True).values())
    pooled_width = embed_dim if c.pool == "query" else c.pooled_width
    return {
        "stem": stem,
        **block_flops(c, tokens, gated=c.mlp != "plain"),
        "pool": pool,
        "projection": c.vectors * projection_flops(c, pooled_width, embed_dim),
    }
