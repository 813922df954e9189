"""Patch embeddings, and patch dropout (FLIP)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from vlm.nn.auto_axes import auto_axes
from vlm.nn.conv import FrozenBatchNorm
from vlm.nn.layers import LayerNorm, Linear, gelu


class PatchConv(nnx.Module):
    """Convolution of `size` x `size` with a stride of `size`, as one matrix product.

    Its kernel has a convolution's layout, (size, size, inputs, outputs). Pixels beyond the last
    full square are dropped, as by a convolution without padding.
    """

    def __init__(
        self,
        size: int,
        inputs: int,
        outputs: int,
        *,
        bias: bool = True,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.lecun_normal(in_axis=(0, 1, 2))
        self.kernel = nnx.Param(init(rngs.params(), (size, size, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
        self.dtype = dtype

    @auto_axes
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q d"]:
        return self.project(_squares(x, self.kernel.shape[0]))

    def project(self, squares: Float[Array, "*b k"]) -> Float[Array, "*b d"]:
        """Project flattened squares, k = size ** 2 * inputs."""
        kernel = self.kernel[...].reshape(-1, self.kernel.shape[-1]).astype(self.dtype)
        x = squares.astype(self.dtype) @ kernel
        return x if self.bias is None else x + self.bias[...].astype(self.dtype)


class PatchStem(PatchConv):
    """Cut an image into square patches and project each one to a token.

    Example:
        >>> from flax import nnx
        >>> stem = vlm.nn.PatchStem(8, 16, bias=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
        >>> stem(jnp.zeros((2, 24, 32, 3))).shape  # 3 x 4 patches
        (2, 12, 16)
    """

    def __init__(
        self, patch_size: int, width: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        super().__init__(patch_size, 3, width, bias=bias, dtype=dtype, rngs=rngs)

    @auto_axes
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        patches = _squares(images, self.kernel.shape[0])
        return self.project(patches.reshape(patches.shape[0], -1, patches.shape[-1]))


class ConvStem(nnx.Module):
    """Stride-2 3x3 convolutions, each with a norm and GELU, then a projection (arXiv:2106.14881).

    Each position is normalised over its channels, as in ConvNeXt (arXiv:2201.03545).

    Example:
        >>> from flax import nnx
        >>> stem = vlm.nn.ConvStem((4, 8), 16, dtype=jnp.float32, rngs=nnx.Rngs(0))
        >>> stem(jnp.zeros((2, 8, 8, 3))).shape  # halved twice
        (2, 4, 16)
    """

    def __init__(self, widths: tuple[int, ...], width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        init = nnx.initializers.he_normal(in_axis=(0, 1, 2))
        inputs = (3, *widths[:-1])
        self.kernels = nnx.List(
            nnx.Param(init(rngs.params(), (3, 3, i, o)))
            for i, o in zip(inputs, widths, strict=True)
        )
        self.norms = nnx.List(LayerNorm(w, 1e-6, rngs=rngs) for w in widths)
        self.project = Linear(widths[-1], width, dtype=dtype, rngs=rngs)
        self.dtype = dtype

    @auto_axes
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        x = images.astype(self.dtype)
        for kernel, norm in zip(self.kernels, self.norms, strict=True):
            kernel = kernel[...].astype(self.dtype)
            x = lax.platform_dependent(x, kernel, cpu=_halve_by_product, default=_halve)
            x = gelu(norm(x))
        return self.project(x.reshape(x.shape[0], -1, x.shape[-1]))


class NestedStem(nnx.Module):
    """Hierarchical patch embedding: each layer projects non-overlapping squares of the last one.

    All but the last layer have a batch norm and a GELU (MobileCLIP-B, arXiv:2311.17049).
    """

    def __init__(
        self, patch_size: int, widths: tuple[int, ...], width: int, *, dtype, rngs: nnx.Rngs
    ):
        init = nnx.initializers.he_normal(in_axis=(0, 1, 2))
        sizes = (patch_size // 2 ** len(widths), *(2 for _ in widths))
        outputs = (*widths, width)
        inputs = (3, *widths)
        self.kernels = nnx.List(
            nnx.Param(init(rngs.params(), (size, size, i, o)))
            for size, i, o in zip(sizes, inputs, outputs, strict=True)
        )
        self.norms = nnx.List(FrozenBatchNorm(w) for w in widths)
        self.bias = nnx.Param(jnp.zeros(width))
        self.dtype = dtype

    @auto_axes
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        x = images.astype(self.dtype)
        for number, kernel in enumerate(self.kernels):
            x = _squares(x, kernel.shape[0]) @ kernel[...].reshape(-1, kernel.shape[-1]).astype(
                self.dtype
            )
            if number < len(self.norms):
                x = gelu(self.norms[number](x))
        return (x + self.bias[...].astype(self.dtype)).reshape(x.shape[0], -1, x.shape[-1])


def _squares(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b p q k"]:
    """Split into flattened squares of `size` x `size`; drop incomplete ones."""
    b, h, w, c = x.shape
    h, w = h // size, w // size
    x = x[:, : h * size, : w * size].reshape(b, h, size, w, size, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, size * size * c)


def _halve(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c d"]) -> Float[Array, "b p q d"]:
    """3x3 convolution of stride 2; with even sides, p = h / 2 and q = w / 2."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=numbers)


def _halve_by_product(x, kernel):
    """`_halve` as one matrix product, since XLA's CPU convolutions are slow inside a loop."""
    h, w = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))  # as "SAME" does for even sides
    windows = [x[:, i : i + h : 2, j : j + w : 2] for i in range(3) for j in range(3)]
    return jnp.concatenate(windows, -1) @ kernel.reshape(-1, kernel.shape[-1])


def random_scores(keys: Key[Array, " b"], n: int) -> Float[Array, "b n"]:
    """Draw a uniform number for each of `n` tokens, by each example's own key."""
    return jax.vmap(lambda key: jax.random.uniform(key, (n,)))(keys)


def drop_patches(
    tokens: Float[Array, "b n d"], rate: float, keys: Key[Array, " b"] | None
) -> Float[Array, "b m d"]:
    """Keep a random fraction `1 - rate` of each image's tokens (FLIP, arXiv:2212.00794).

    Without keys (inference), keep all. The order of tokens is preserved.
    """
    if keys is None or rate == 0:
        return tokens
    count = max(1, round(tokens.shape[1] * (1 - rate)))
    indices = jnp.sort(lax.top_k(random_scores(keys, tokens.shape[1]), count)[1], axis=1)
    return jnp.take_along_axis(tokens, indices[..., None], axis=1)


def drop_real_patches(
    tokens: Float[Array, "b n d"],
    mask: Bool[Array, "b n"],
    rate: float,
    keys: Key[Array, " b"] | None,
) -> tuple[Float[Array, "b m d"], Bool[Array, "b m"]]:
    """`drop_patches` for images with padding: keep a fraction of the tokens under each mask.

    Images with fewer tokens are padded again. The order of tokens is random; they already contain
    their positions.
    """
    if keys is None or rate == 0:
        return tokens, mask
    scores = jnp.where(mask, random_scores(keys, tokens.shape[1]), -1)
    indices = lax.top_k(scores, max(1, round(tokens.shape[1] * (1 - rate))))[1]
    kept = jnp.maximum(1, jnp.round(mask.sum(1) * (1 - rate)))
    return (
        jnp.take_along_axis(tokens, indices[..., None], axis=1),
        jnp.arange(indices.shape[1]) < kept[:, None],
    )
