"""Position embeddings: sinusoidal, rotary (arXiv:2104.09864), and ALiBi (arXiv:2108.12409)."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

# Sines and cosines, one row per token: as wide as a head to rotate neighbouring pairs of channels,
# or half as wide to rotate the two halves of a head.
Rotation = tuple[Float[Array, "n r"], Float[Array, "n r"]]


def sinusoids(count: int, width: int) -> Float32[np.ndarray, "count width"]:
    """Position table with sines in the first half of the channels and cosines in the second.

    This is the layout of tensor2tensor, fairseq and praxis; arXiv:1706.03762 interleaves them.

    Example:
        >>> from vlm.nn.positions import sinusoids
        >>> sinusoids(2, 4)[0].tolist()
        [0.0, 0.0, 1.0, 1.0]
    """
    half = width // 2
    step = np.float32(-math.log(10_000) / max(half - 1, 1))
    angles = np.arange(count, dtype=np.float32)[:, None] * np.exp(
        np.arange(half, dtype=np.float32) * step
    )
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return np.pad(table, ((0, 0), (0, width % 2))).astype(np.float32)


def grid_rotation(
    grid: int,
    head_dim: int,
    *,
    first: int,
    before: int,
    span: int | None = None,
    rows_first: bool = False,
    base: float = 10_000.0,
    centred: bool = False,
) -> Rotation:
    """Rotation of each patch of a `grid` x `grid` image, as in the Perception Encoder.

    Half of the channels rotate with the column, half with the row, both counted from `first`. The
    `before` prefix tokens are not rotated (arXiv:2504.13181). EVA-02 has rows first, and positions
    scaled to a grid of `span` rows (arXiv:2303.11331). DINOv3 has rows first, another `base`, and
    `centred` positions: the image spans -2 pi to 2 pi (arXiv:2508.10104).
    """
    count = head_dim // 4
    bands = base ** -(np.arange(count, dtype=np.float32) / count)
    halves = np.divmod(np.arange(grid * grid), grid)  # rows, columns
    halves = halves if rows_first else halves[::-1]
    stretch = np.float32(1) if span is None else np.float32(span) / np.float32(grid)
    places = [(half * stretch + first).astype(np.float32) for half in halves]
    if centred:
        places = [2 * np.pi * (2 * (half.astype(np.float32) + 0.5) / grid - 1) for half in halves]
    angles = np.concatenate([place[:, None] * bands for place in places], axis=1)
    angles = np.repeat(angles.astype(np.float32), 2, axis=1)  # pairs of channels rotate together
    angles = np.concatenate([np.zeros((before, head_dim), np.float32), angles])
    return jnp.asarray(np.sin(angles)), jnp.asarray(np.cos(angles))


def token_rotation(count: int, head_dim: int, base: float) -> Rotation:
    """Rotation of the first `count` tokens of a text, for the two halves of a head."""
    bands = 1.0 / base ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    angles = np.arange(count, dtype=np.float32)[:, None] * bands.astype(np.float32)
    return jnp.asarray(np.sin(angles)), jnp.asarray(np.cos(angles))


class Alibi(NamedTuple):
    """ALiBi: logits fall with the distance of two tokens by a slope for each head.

    Tokens attend in both directions, as in JinaBERT (arXiv:2310.19923). `keys` is true for real
    ones. Attention computes the distances, so that no array of (h, n, n) is in the program.
    """

    slopes: Float[Array, "1 h 1 1"]
    keys: Bool[Array, "#b 1 1 k"] | None = None


def alibi(heads: int, keys: Bool[Array, "#b 1 1 k"] | None = None) -> Alibi:
    """ALiBi with the slopes of its paper (arXiv:2108.12409) for a number of heads.

    Example:
        >>> from vlm.nn.positions import alibi
        >>> alibi(2).slopes.ravel().tolist()
        [0.0625, 0.00390625]
    """
    power = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    # Between the slopes of a power of two, every other one of those of the next power.
    slopes += [2.0 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return Alibi(jnp.asarray(slopes, jnp.float32)[None, :, None, None], keys)


def rotate(x: Float[Array, "b n h d"], rotation: Rotation) -> Float[Array, "b n h d"]:
    """Rotate pairs of channels of each token: neighbours, or those of the two halves of a head."""
    sin, cos = (part[:, None] for part in rotation)
    wide = x.astype(jnp.float32)
    if sin.shape[-1] < x.shape[-1]:
        first, second = wide[..., : sin.shape[-1]], wide[..., sin.shape[-1] :]
        turned = [first * cos - second * sin, second * cos + first * sin]
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)
    turned = jnp.stack([-wide[..., 1::2], wide[..., ::2]], axis=-1).reshape(x.shape)
    return (wide * cos + turned * sin).astype(x.dtype)
