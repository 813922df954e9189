"""VideoPrism-LvT's vision tower (Zhao et al., 2024, arXiv:2402.13217), as in transformers.

Blocks over the patches of each frame, then over the frames of each patch (a factorized encoder,
arXiv:2103.15691), then over all tokens; and attention pooling.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from vlm.config import VideoPrismConfig
from vlm.nn.attention import attend
from vlm.nn.auto_axes import auto_axes
from vlm.nn.layers import LayerNorm, linear
from vlm.nn.patches import PatchStem
from vlm.nn.transformer import Execution, Transformer

_SOFTPLUS_SCALE = 1.442695041  # 1 / log(2): a scale of 0 changes nothing


class VideoPrismTower(nnx.Module):
    """Map normalised videos (b, f, h, w, 3) to embeddings of `embed_dim` dimensions."""

    def __init__(
        self, config: VideoPrismConfig, embed_dim: int, *, execution: Execution, rngs: nnx.Rngs
    ):
        c, options = config, {"dtype": execution.dtype, "rngs": rngs}
        self.config = config
        self.stem = PatchStem(c.patch_size, c.width, bias=True, **options)
        normal = nnx.initializers.normal(c.width**-0.5)
        self.position = nnx.Param(normal(rngs.params(), (c.tokens(), c.width)))
        self.time_position = nnx.Param(normal(rngs.params(), (c.frames, c.width)))
        self.transformer = _transformer(c, c.depth, execution, rngs)
        self.norm = LayerNorm(c.width, c.norm_eps, rngs=rngs)
        self.time_transformer = _transformer(c, c.time_depth, execution, rngs)
        self.time_norm = LayerNorm(c.width, c.norm_eps, rngs=rngs)
        self.joint_transformer = _transformer(c, c.joint_depth, execution, rngs)
        self.pool = QueryPool(c, dtype=execution.dtype, rngs=rngs)
        self.pool_norm = LayerNorm(c.width, c.norm_eps, rngs=rngs)

    @auto_axes
    def __call__(
        self, videos: Float[Array, "b f h w 3"], *, keys: Key[Array, " b"] | None = None, **_: Any
    ) -> Float[Array, "b e"]:
        """Embed videos; there is no dropout, and so no use of `keys`."""
        b, f = videos.shape[:2]
        x = self.stem(videos.reshape(b * f, *videos.shape[2:]))
        x = x + self.position[...].astype(x.dtype)
        x = self.norm(self.transformer(x))
        x = x.reshape(b, f, *x.shape[1:]).swapaxes(1, 2)  # (b, n, f, d)
        n = x.shape[1]
        x = x.reshape(b * n, f, -1) + self.time_position[...].astype(x.dtype)
        x = self.time_norm(self.time_transformer(x))
        x = x.reshape(b, n, f, -1).swapaxes(1, 2).reshape(b, f * n, -1)
        return self.pool_norm(self.pool(self.joint_transformer(x)))


def _transformer(
    c: VideoPrismConfig, depth: int, execution: Execution, rngs: nnx.Rngs
) -> Transformer:
    return Transformer(
        c.width,
        depth,
        c.heads,
        c.mlp_dim,
        act="gelu",
        norm_eps=c.norm_eps,
        softcap=c.softcap,
        execution=execution,
        rngs=rngs,
    )


class QueryPool(nnx.Module):
    """Attention of one learned query, whose heads are wider than the tokens and are scaled."""

    def __init__(self, c: VideoPrismConfig, *, dtype, rngs: nnx.Rngs):
        split = (c.heads, c.mlp_dim // c.heads)
        project = functools.partial(nnx.LinearGeneral, dtype=dtype, rngs=rngs)
        self.probe = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (c.width,)))
        self.scale = nnx.Param(jnp.zeros(split[1]))
        self.query, self.key, self.value = (project(c.width, split) for _ in range(3))
        self.out = project(split, c.width, axis=(-2, -1))

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        heads = self.query.kernel.shape[-2:]
        scale = _SOFTPLUS_SCALE * jax.nn.softplus(self.scale[...])
        query = linear(self.query, self.probe[...][None]).reshape(1, 1, *heads)
        query = jnp.broadcast_to(query * scale.astype(query.dtype), (len(x), 1, *heads))
        key, value = (
            linear(layer, x).reshape(*x.shape[:2], *heads) for layer in (self.key, self.value)
        )
        return linear(self.out, attend(query, key, value).reshape(len(x), -1))


def flops(config: VideoPrismConfig, embed_dim: int, *, training: bool = False) -> dict[str, float]:
    """Forward FLOPs of one video, by part: stem, projections, scores, mlp, pool."""
    c, n = config, config.tokens()
    tokens = c.frames * n
    depth = c.depth + c.time_depth + c.joint_depth
    lengths = c.depth * n + c.time_depth * c.frames + c.joint_depth * tokens
    return {
        "stem": 2 * tokens * c.patch_size**2 * 3 * c.width,
        "projections": depth * 2 * tokens * 4 * c.width**2,
        "scores": 2 * 2 * tokens * lengths * c.width,
        "mlp": depth * 2 * tokens * 2 * c.width * c.mlp_dim,
        "pool": 2 * (2 * tokens * c.width * c.mlp_dim + 2 * c.width * c.mlp_dim),
    }
