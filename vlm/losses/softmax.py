"""The softmax loss of CLIP (Radford et al., 2021, arXiv:2103.00020).

Rows of the logits classify images among texts, columns classify texts among images. For a row with
the positive logit l_ii and the negatives l_ij, the cross-entropy is

    -log softmax(l_i)_i = log sum_j exp(l_ij) - l_ii = softplus(lse_i - l_ii)

where lse_i = log sum_{j != i} exp(l_ij). It needs two statistics of the negatives, their maximum
and their sum of exponentials relative to it, which accumulate tile by tile in any order. The same
tile gives those of the columns. The gradient is a second pass over the tiles:

    2B dL/dl_ij = exp(l_ij) / sum_k exp(l_ik) + exp(l_ij) / sum_k exp(l_kj)        (j != i)
    2B dL/dl_ii = -(the share of the negatives in row i + that in column i)

Since positives and negatives are kept separate, no term is a small difference of large numbers: the
loss and its gradient stay precise when the model separates all pairs well.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from vlm.losses.ring import (
    MASKED_LOGIT,
    Ring,
    add,
    at_least_float32,
    dot,
    dot_pairs,
    mask_same_group,
    pull_back,
)
from vlm.sharding import under_auto_axes


@under_auto_axes(PartitionSpec())
def softmax_loss(
    z_image: Float[Array, "b d"],
    z_text: Float[Array, "b d"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Cross-entropy over all B texts and all B images, the mean of both directions.

    logits = exp(logit_scale) * z_image @ z_text.T, in float32 or wider: a bias would change nothing
    and is left out. Holds the B x B matrix: this is the definition that `contrastive_loss` computes
    in tiles.

    Source: arXiv:2103.00020, figure 3.

    Example:
        >>> z = jnp.eye(4)
        >>> float(vlm.losses.softmax_loss(z, z, jnp.log(100.0))) < 1e-6  # every pair finds its own
        True
    """
    logits = jnp.exp(logit_scale) * at_least_float32(z_image) @ at_least_float32(z_text).T
    positives = jnp.diagonal(logits)
    image_to_text = jax.nn.logsumexp(logits, axis=1) - positives
    text_to_image = jax.nn.logsumexp(logits, axis=0) - positives
    return (image_to_text.mean() + text_to_image.mean()) / 2


class Statistics(NamedTuple):
    """Sum of exponentials as two numbers: exp(max) * sum."""

    max: Float[Array, "..."]
    sum: Float[Array, "..."]


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Statistics of the union of two sets of logits."""
    top = jnp.maximum(a.max, b.max)
    return Statistics(top, a.sum * jnp.exp(a.max - top) + b.sum * jnp.exp(b.max - top))


def value(ring: Ring, z_image, z_text, logit_scale, logit_bias, groups) -> Float[Array, ""]:
    """Loss of the global batch, in one trip around the ring; a bias cancels out."""
    scale = jnp.exp(logit_scale)
    rows, columns = _negatives(ring, z_image, z_text, scale, groups)
    return _loss(ring, scale * dot_pairs(z_image, z_text), rows, columns)


def value_and_gradients(ring: Ring, z_image, z_text, logit_scale, logit_bias, groups) -> tuple:
    """Loss and gradients of its four inputs: the gradients take a second trip around the ring."""
    scale = jnp.exp(logit_scale)
    positives = scale * dot_pairs(z_image, z_text)
    rows, columns = _negatives(ring, z_image, z_text, scale, groups)
    own = Statistics(positives, jnp.ones_like(positives))
    all_rows, all_columns = merge(rows, own), merge(columns, own)

    def visit(images, texts, hide):
        (x, row, own), (y, column, other) = images, texts
        logits = mask_same_group(hide(scale * dot(x, y)), own, other)
        in_row = jnp.exp(logits - row.max[:, None]) / row.sum[:, None]
        in_column = jnp.exp(logits - column.max) / column.sum
        return pull_back(in_row + in_column, x, y)

    none = jnp.zeros(z_image.shape, jnp.float32)
    images, texts = (z_image, all_rows, groups), (z_text.T, all_columns, groups)
    d_image, d_text = ring.all_pairs(visit, add, images, texts, (none, none.T))
    negative = _share(rows, all_rows) + _share(columns, all_columns)
    mean = scale / (2 * len(positives) * ring.devices)
    d_image = mean * (d_image - negative[:, None] * z_text)
    d_text = mean * (d_text.T - negative[:, None] * z_image)
    d_scale = ring.total(jnp.sum(z_image * d_image))  # l = exp(t) x.y, so dl/dt = x . dl/dx
    d_bias = None if logit_bias is None else jnp.zeros_like(logit_bias)
    return _loss(ring, positives, rows, columns), (d_image, d_text, d_scale, d_bias)


def _negatives(ring, z_image, z_text, scale, groups) -> tuple[Statistics, Statistics]:
    """Statistics of the negatives of each row and of each column."""

    def visit(images, texts, hide):
        (x, own), (y, other) = images, texts
        logits = mask_same_group(hide(scale * dot(x, y)), own, other)
        row, column = logits.max(1), logits.max(0)
        return (
            Statistics(row, jnp.exp(logits - row[:, None]).sum(1)),
            Statistics(column, jnp.exp(logits - column).sum(0)),
        )

    zeros = jnp.zeros(len(z_image), jnp.float32)
    none = Statistics(zeros + MASKED_LOGIT, zeros)
    return ring.all_pairs(visit, merge, (z_image, groups), (z_text.T, groups), (none, none))


def _loss(ring, positives, rows: Statistics, columns: Statistics) -> Float[Array, ""]:
    in_row = jax.nn.softplus(rows.max - positives + jnp.log(rows.sum))
    in_column = jax.nn.softplus(columns.max - positives + jnp.log(columns.sum))
    return ring.total(jnp.sum(in_row + in_column)) / (2 * len(positives) * ring.devices)


def _share(part: Statistics, total: Statistics) -> Float[Array, " b"]:
    """Softmax probability of a subset of the logits."""
    return part.sum * jnp.exp(part.max - total.max) / total.sum
