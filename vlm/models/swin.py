"""Swin (Liu et al., 2021, arXiv:2103.14030), as in timm: attention in shifted windows."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vlm.config import SwinConfig
from vlm.models.conv_tower import ConvTower
from vlm.models.projection import projection, projection_flops
from vlm.nn.layers import LayerNorm, Linear, Mlp, linear
from vlm.nn.patches import PatchConv
from vlm.nn.transformer import Execution, run_stacked, stack_blocks

_MASKED = -100.0  # logit of positions from the opposite edge of the image, as the weights know it


class SwinTower(ConvTower):
    """Map normalised images to embeddings of `embed_dim` dimensions (not unit norm)."""

    def __init__(self, config: SwinConfig, embed_dim: int, *, execution: Execution, rngs: nnx.Rngs):
        c, options = config, {"dtype": execution.dtype, "rngs": rngs}
        self.config, self.dtype = config, execution.dtype
        self.stem = PatchConv(4, 3, c.widths[0], **options)
        self.stem_norm = LayerNorm(c.widths[0], c.norm_eps, rngs=rngs)
        self.stages = nnx.List(
            Stage(c, number, execution=execution, rngs=rngs) for number in range(len(c.depths))
        )
        self.norm = LayerNorm(c.width, c.norm_eps, rngs=rngs)
        self.projection = projection(c, c.width, embed_dim, **options)

    def _first_layers(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b p q c"]:
        return self.stem_norm(self.stem(images))

    def _positions(self, images, keys, intermediates) -> Array:
        return self.norm(super()._positions(images, keys, intermediates))


class Stage(nnx.Module):
    """Stage of stacked pairs of blocks, after patch merging in all but the first."""

    def __init__(self, config: SwinConfig, number: int, *, execution: Execution, rngs: nnx.Rngs):
        c, options = config, {"dtype": execution.dtype, "rngs": rngs}
        width = c.widths[number]
        self.merging = PatchMerging(c.widths[number - 1], width, c, **options) if number else None
        self.blocks = stack_blocks(
            lambda rngs: Pair(c, number, dtype=execution.dtype, rngs=rngs),
            c.depths[number] // 2,
            rngs,
        )
        self.execution = execution

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q d"]:
        x = x if self.merging is None else self.merging(x)
        return run_stacked(self.blocks, x, lambda pair, x: pair(x), self.execution)


class PatchMerging(nnx.Module):
    """Concatenate the channels of 2x2 positions, and reduce them."""

    def __init__(
        self, inputs: int, outputs: int, c: SwinConfig, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.norm = LayerNorm(4 * inputs, c.norm_eps, rngs=rngs)
        self.reduction = Linear(4 * inputs, outputs, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q d"]:
        b, h, w, c = x.shape
        x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
        x = x.reshape(b, -(-h // 2), 2, -(-w // 2), 2, c).transpose(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.reshape(*x.shape[:3], 4 * c)))


class Pair(nnx.Module):
    """Two blocks: one with plain windows, and one whose windows are shifted."""

    def __init__(self, c: SwinConfig, number: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        side = c.sides()[number]
        window = min(c.window, side)
        shift = window // 2 if side > window else 0
        self.plain = Block(c, number, window, 0, dtype=dtype, rngs=rngs)
        self.shifted = Block(c, number, window, shift, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.shifted(self.plain(x))


class Block(nnx.Module):
    """Block of attention inside windows and an MLP, with norms before both."""

    def __init__(
        self,
        c: SwinConfig,
        number: int,
        window: int,
        shift: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        width, options = c.widths[number], {"dtype": dtype, "rngs": rngs}
        self.attention_norm = LayerNorm(width, c.norm_eps, rngs=rngs)
        self.attention = WindowAttention(width, c.heads[number], window, **options)
        self.mlp_norm = LayerNorm(width, c.norm_eps, rngs=rngs)
        self.mlp = Mlp(width, c.mlp_dims[number], "gelu", **options)
        self.window, self.shift = window, shift

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        window, shift, (b, side, _, width) = self.window, self.shift, x.shape
        y = jnp.roll(self.attention_norm(x), (-shift, -shift), (1, 2))
        count = -(-side // window)
        padding = (0, count * window - side)
        y = jnp.pad(y, ((0, 0), padding, padding, (0, 0)))
        y = y.reshape(b, count, window, count, window, width).transpose(0, 1, 3, 2, 4, 5)
        mask = jnp.asarray(shift_mask(count * window, window, shift))
        y = self.attention(y.reshape(b, count**2, window**2, width), mask)
        y = y.reshape(b, count, count, window, window, width).transpose(0, 1, 3, 2, 4, 5)
        y = y.reshape(b, count * window, count * window, width)[:, :side, :side]
        x = x + jnp.roll(y, (shift, shift), (1, 2))
        return x + self.mlp(self.mlp_norm(x))


class WindowAttention(nnx.Module):
    """Multi-head attention inside windows, with a learned bias for each relative position."""

    def __init__(self, width: int, heads: int, window: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        split, init = (heads, width // heads), nnx.initializers.xavier_uniform()
        options = {"kernel_init": init, "dtype": dtype, "rngs": rngs}
        self.query = nnx.LinearGeneral(width, split, **options)
        self.key = nnx.LinearGeneral(width, split, **options)
        self.value = nnx.LinearGeneral(width, split, **options)
        self.out = nnx.LinearGeneral(split, width, axis=(-2, -1), **options)
        normal = nnx.initializers.normal(0.02)
        table = ((2 * window - 1) ** 2, heads)
        self.relative_position_bias = nnx.Param(normal(rngs.params(), table))
        self.window = window

    def __call__(
        self, x: Float[Array, "b w n c"], mask: Float[Array, "#w n n"]
    ) -> Float[Array, "b w n c"]:
        heads, head_dim = self.query.kernel.shape[-2:]
        query, key, value = (
            linear(layer, x).reshape(*x.shape[:3], heads, head_dim)
            for layer in (self.query, self.key, self.value)
        )
        bias = self.relative_position_bias[...][relative_index(self.window)].transpose(2, 0, 1)
        logits = jnp.einsum("bwqhd,bwkhd->bwhqk", query, key, preferred_element_type=jnp.float32)
        logits = logits * head_dim**-0.5 + bias + mask[:, None]
        weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
        y = jnp.einsum("bwhqk,bwkhd->bwqhd", weights, value)
        return linear(self.out, y.reshape(x.shape))


def relative_index(window: int) -> np.ndarray:
    """Row of the table of biases for each pair of positions of a window, by their offset."""
    places = np.stack(np.divmod(np.arange(window**2), window))  # rows, columns
    rows, columns = places[:, :, None] - places[:, None] + window - 1
    return rows * (2 * window - 1) + columns


def shift_mask(side: int, window: int, shift: int) -> np.ndarray:
    """Logits to add in each window: positions that the shift moved around an edge are masked."""
    if not shift:
        return np.zeros((1, window**2, window**2), np.float32)
    region = np.zeros(side, int)
    region[side - window : side - shift], region[side - shift :] = 1, 2
    regions = (3 * region[:, None] + region).reshape(side // window, window, -1, window)
    regions = regions.transpose(0, 2, 1, 3).reshape(-1, window**2)
    apart = regions[:, None] != regions[:, :, None]
    return np.where(apart, np.float32(_MASKED), np.float32(0))


def flops(config: SwinConfig, embed_dim: int, *, training: bool = False) -> dict[str, float]:
    """Forward FLOPs of one image, by part: stem, merging, projections, scores, mlp, projection."""
    c, sides = config, config.sides()
    merging = projections = scores = mlp = 0.0
    for number, (side, width, depth) in enumerate(zip(sides, c.widths, c.depths, strict=True)):
        if number:
            merging += 2 * side**2 * 4 * c.widths[number - 1] * width
        window = min(c.window, side)
        padded = (-(-side // window) * window) ** 2
        projections += depth * 2 * padded * 4 * width**2
        scores += depth * 2 * 2 * padded * window**2 * width
        mlp += depth * 2 * side**2 * 2 * width * c.mlp_dims[number]
    return {
        "stem": 2 * sides[0] ** 2 * 48 * c.widths[0],
        "merging": merging,
        "projections": projections,
        "scores": scores,
        "mlp": mlp,
        "projection": projection_flops(c, c.width, embed_dim),
    }
