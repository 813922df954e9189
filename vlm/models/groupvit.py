"""GroupViT (Xu et al., 2022, arXiv:2202.11094), a vision tower that groups patches."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Key

from vlm.config import GroupViTConfig
from vlm.models.projection import MlpProjection, projection, projection_flops
from vlm.nn.attention import Attention
from vlm.nn.auto_axes import auto_axes
from vlm.nn.intermediates import Intermediates, capture
from vlm.nn.layers import LayerNorm, Linear, Mlp, activation, split_keys
from vlm.nn.patches import PatchStem
from vlm.nn.transformer import Execution, Transformer, block_flops


class GroupViTTower(nnx.Module):
    """Map normalised images to embeddings of `embed_dim` dimensions (not unit norm)."""

    def __init__(
        self, config: GroupViTConfig, embed_dim: int, *, execution: Execution, rngs: nnx.Rngs
    ):
        c, self.config = config, config
        options = {"dtype": execution.dtype, "rngs": rngs}
        self.stem = PatchStem(c.patch_size, c.width, bias=True, **options)
        self.stem_norm = LayerNorm(c.width, c.norm_eps, rngs=rngs)
        normal = nnx.initializers.normal(c.width**-0.5)
        table = ((c.image_size // c.patch_size) ** 2, c.width)
        self.position = nnx.Param(normal(rngs.params(), table))
        before = (0, *c.groups)
        self.stages = nnx.List(
            Stage(c, depth, previous, groups, execution=execution, rngs=rngs)
            for depth, previous, groups in zip(c.depths, before, c.groups, strict=False)
        )
        self.norm = LayerNorm(c.width, c.norm_eps, rngs=rngs)
        self.projection = projection(c, c.width, embed_dim, **options)

    @auto_axes
    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        *,
        keys: Key[Array, " b"] | None = None,
        intermediates: Intermediates | None = None,
    ) -> Float[Array, "b e"]:
        """Embed images; `keys`, one per example, add noise to the assignment of patches.

        `intermediates` capture "stem".
        """
        x = self.stem_norm(self.stem(images))
        x = capture(intermediates, "stem", x + self.position[...].astype(x.dtype))
        groups = None
        for stage in self.stages:
            own, keys = split_keys(keys)
            x, groups = stage(x, groups, own)
        x = self.norm(x).mean(1)
        return x if self.projection is None else self.projection(x)


class Stage(nnx.Module):
    """Blocks over tokens and group tokens; then each token joins the segment of one group."""

    def __init__(
        self,
        c: GroupViTConfig,
        depth: int,
        previous: int,
        groups: int,
        *,
        execution: Execution,
        rngs: nnx.Rngs,
    ):
        shape, dtype = (groups, c.width), execution.dtype
        start = nnx.initializers.normal(c.width**-0.5)
        self.groups = nnx.Param(start(rngs.params(), shape)) if groups else None
        self.transformer = Transformer(
            c.width,
            depth,
            c.heads,
            c.mlp_dim,
            act=c.activation,
            norm_eps=c.norm_eps,
            execution=execution,
            rngs=rngs,
        )
        mixed = bool(previous and groups)
        self.previous_norm = LayerNorm(c.width, c.norm_eps, rngs=rngs) if mixed else None
        hidden = c.width // 2
        self.previous_mlp = _mixer(c, previous, hidden, groups, dtype, rngs) if mixed else None
        self.assign = Assignment(c, groups, dtype=dtype, rngs=rngs) if groups else None

    def __call__(
        self, x: Float[Array, "b n d"], previous: Float[Array, "b p d"] | None, keys
    ) -> tuple[Float[Array, "b m d"], Float[Array, "b g d"] | None]:
        """Return the tokens of the next stage, and the group tokens after the blocks."""
        if self.groups is None:
            return self.transformer(x), None
        count = x.shape[1]
        groups = jnp.broadcast_to(self.groups[...].astype(x.dtype), (len(x), *self.groups.shape))
        if previous is not None and self.previous_norm is not None:
            assert self.previous_mlp is not None
            groups = groups + _over_tokens(self.previous_mlp, self.previous_norm(previous))
        x = self.transformer(jnp.concatenate([x, groups], axis=1))
        x, groups = x[:, :count], x[:, count:]
        assert self.assign is not None
        return self.assign(x, groups, keys), groups


class Assignment(nnx.Module):
    """Assign each token to the segment of the group that attends to it most."""

    def __init__(self, c: GroupViTConfig, groups: int, *, dtype: Any, rngs: nnx.Rngs):
        def norm() -> LayerNorm:
            return LayerNorm(c.width, c.norm_eps, rngs=rngs)

        def linear() -> Linear:
            return Linear(c.width, c.width, dtype=dtype, rngs=rngs)

        self.eps = c.assign_eps
        self.group_norm, self.token_norm, self.mixed_norm = norm(), norm(), norm()
        self.mixer = _mixer(c, groups, c.group_mlp_dim, groups, dtype, rngs)
        self.attention = Attention(c.width, c.heads, dtype=dtype, rngs=rngs)
        self.mlp_norm = norm()
        self.mlp = Mlp(c.width, c.mlp_dim, c.activation, dtype=dtype, rngs=rngs)
        self.attended_norm = norm()
        self.query, self.key, self.value, self.out = (linear() for _ in range(4))
        self.segment_norm = norm()
        self.segment_mlp = Mlp(c.width, c.segment_mlp_dim, c.activation, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        groups: Float[Array, "b g d"],
        keys: Key[Array, " b"] | None,
    ) -> Float[Array, "b g d"]:
        """Segments, the mean of their tokens; `keys` add Gumbel noise, as in training."""
        x, groups = self.token_norm(x), self.group_norm(groups)
        groups = self.mixed_norm(_over_tokens(self.mixer, groups))
        groups = groups + self.attention(groups, x)
        groups = self.attended_norm(groups + self.mlp(self.mlp_norm(groups)))

        query, key, value = self.query(groups), self.key(x), self.value(x)
        logits = jnp.einsum("bgd,bnd->bgn", query, key, preferred_element_type=jnp.float32)
        logits = logits * x.shape[-1] ** -0.5
        if keys is not None:
            logits += jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        soft = jax.nn.softmax(logits, axis=1)
        hard = jax.nn.one_hot(logits.argmax(1), logits.shape[1], axis=1, dtype=soft.dtype)
        weights = hard + soft - lax.stop_gradient(soft)  # the gradient is that of the softmax
        weights = weights / (weights.sum(-1, keepdims=True) + self.eps)
        merged = jnp.einsum("bgn,bnd->bgd", weights.astype(x.dtype), value)
        segments = self.out(merged) + groups
        return segments + self.segment_mlp(self.segment_norm(segments))


class _Blocks(NamedTuple):
    """Sizes of a stage's blocks."""

    width: int
    depth: int
    mlp_dim: int


def _mixer(
    c: GroupViTConfig, inputs: int, hidden: int, outputs: int, dtype, rngs: nnx.Rngs
) -> MlpProjection:
    """MLP over the axis of tokens."""
    act = activation(c.activation)
    return MlpProjection(
        inputs, hidden, outputs, act=act, bias=True, out_bias=True, dtype=dtype, rngs=rngs
    )


def _over_tokens(layer: MlpProjection, x: Float[Array, "b n d"]) -> Float[Array, "b m d"]:
    return layer(x.swapaxes(1, 2)).swapaxes(1, 2)


def flops(config: GroupViTConfig, embed_dim: int, *, training: bool = False) -> dict[str, float]:
    """Forward FLOPs of one image, by part: stem, projections, scores, mlp, groups, projection."""
    c, tokens = config, (config.image_size // config.patch_size) ** 2
    total = {"stem": 2.0 * tokens * c.patch_size**2 * 3 * c.width}
    total |= dict.fromkeys(("projections", "scores", "mlp", "groups"), 0.0)
    previous = 0
    for depth, groups in zip(c.depths, c.groups, strict=True):
        blocks = _Blocks(c.width, depth, c.mlp_dim)
        for part, count in block_flops(blocks, tokens + groups).items():
            total[part] += count
        if groups:
            mixers = c.width * groups * (2 * c.group_mlp_dim)
            mixers += c.width * (previous + groups) * (c.width // 2) * bool(previous)
            products = c.width**2 * (4 * tokens + 4 * groups) + 4 * tokens * groups * c.width
            mlps = 2 * groups * c.width * (c.mlp_dim + c.segment_mlp_dim)
            total["groups"] += 2.0 * (mixers + products + mlps)
            previous = tokens = groups
    return total | {"projection": projection_flops(c, c.width, embed_dim)}
