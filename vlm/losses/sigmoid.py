"""The sigmoid loss of SigLIP (Zhai et al., 2023, arXiv:2303.15343).

Each pair is a binary classification. A positive costs softplus(-l_ii), a negative softplus(l_ij),
and the loss is the sum over all pairs divided by B. A pair's gradient depends only on its logit,

    B dL/dl_ij = sigmoid(l_ij)        B dL/dl_ii = -sigmoid(-l_ii)

so one pass over the tiles gives the loss and the gradients: one trip around the ring is enough.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from vlm.losses.ring import Ring, add, at_least_float32, dot, dot_pairs, mask_same_group, pull_back
from vlm.sharding import under_auto_axes


@under_auto_axes(PartitionSpec())
def sigmoid_loss(
    z_image: Float[Array, "b d"],
    z_text: Float[Array, "b d"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Binary cross-entropy of every pair in the batch, summed and divided by B.

    logits = exp(logit_scale) * z_image @ z_text.T + logit_bias, in float32 or wider. Holds the
    B x B matrix: this is the definition that `contrastive_loss` computes in tiles.

    Source: arXiv:2303.15343, algorithm 1.

    Example:
        >>> z = jnp.eye(4)
        >>> loss = vlm.losses.sigmoid_loss(z, z, jnp.log(20.0), jnp.float32(-10))
        >>> float(loss) < 1e-3
        True
    """
    logits = jnp.exp(logit_scale) * at_least_float32(z_image) @ at_least_float32(z_text).T
    if logit_bias is not None:
        logits += logit_bias
    sign = 2 * jnp.eye(len(logits)) - 1  # +1 for positives, -1 for negatives
    return jax.nn.softplus(-sign * logits).sum() / len(logits)


def value(ring: Ring, z_image, z_text, logit_scale, logit_bias, groups) -> Float[Array, ""]:
    """Loss of the global batch, in one trip around the ring."""
    scale, bias = jnp.exp(logit_scale), _zero_if_none(logit_bias)

    def visit(images, texts, hide):
        (x, own), (y, other) = images, texts
        logits = mask_same_group(hide(scale * dot(x, y) + bias), own, other)
        return jax.nn.softplus(logits).sum(1), ()

    none = jnp.zeros(len(z_image), jnp.float32)
    images, texts = (z_image, groups), (z_text.T, groups)
    negatives, _ = ring.all_pairs(visit, add, images, texts, (none, ()))
    positives = jax.nn.softplus(-(scale * dot_pairs(z_image, z_text) + bias))
    return ring.total(jnp.sum(positives + negatives)) / (len(z_image) * ring.devices)


def value_and_gradients(ring: Ring, z_image, z_text, logit_scale, logit_bias, groups) -> tuple:
    """Loss and gradients of its four inputs, in one trip around the ring."""
    scale, bias = jnp.exp(logit_scale), _zero_if_none(logit_bias)

    def visit(images, texts, hide):
        (x, own), (y, other) = images, texts
        logits = mask_same_group(hide(scale * dot(x, y) + bias), own, other)
        losses, g = _softplus_and_sigmoid(logits)
        d_image, d_text = pull_back(g, x, y)
        return (losses.sum(1), g.sum(1), d_image), d_text

    per_image, per_width = jnp.zeros(len(z_image)), jnp.zeros(z_image.shape)
    none = (per_image, per_image, per_width), per_width.T
    images, texts = (z_image, groups), (z_text.T, groups)
    (losses, g, d_image), d_text = ring.all_pairs(visit, add, images, texts, none)

    logits = scale * dot_pairs(z_image, z_text) + bias
    positive = -jax.nn.sigmoid(-logits)
    mean = 1 / (len(logits) * ring.devices)
    loss = mean * ring.total(jnp.sum(losses + jax.nn.softplus(-logits)))
    d_image = mean * scale * (d_image + positive[:, None] * z_text)
    d_text = mean * scale * (d_text.T + positive[:, None] * z_image)
    d_scale = ring.total(jnp.sum(z_image * d_image))  # l = exp(t) x.y + b, so dl/dt = x . dl/dx
    d_bias = None if logit_bias is None else mean * ring.total(jnp.sum(g + positive))
    return loss, (d_image, d_text, d_scale, d_bias)


def _softplus_and_sigmoid(x: Array) -> tuple[Array, Array]:
    """Loss of a negative and its derivative, from one exponential that cannot overflow."""
    e = jnp.exp(-jnp.abs(x))
    return jnp.maximum(x, 0) + jnp.log1p(e), jnp.where(x > 0, 1, e) / (1 + e)


def _zero_if_none(logit_bias):
    return 0.0 if logit_bias is None else logit_bias
