"""Exact gradient accumulation for contrastive losses (GradCache, arXiv:2101.06983).

A contrastive loss is not a sum over micro-batches: every image needs every text of the whole batch
as a negative. Embeddings fit in memory; the towers' activations do not. So embed all micro-batches
and keep only the embeddings, compute the loss and the gradients of all embeddings at once, then
run each micro-batch again with its backward pass.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from vlm.errors import ConfigError


def cached_value_and_grad(
    embed: Callable[[Any, Any, Any], tuple[Any, ...]],
    loss: Callable[..., Any],
    *,
    has_aux: bool = False,
) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """Make a function for the loss and gradient of a batch with the memory of one micro-batch.

    Args:
        embed: `embed(params, batch, key) -> (z_image, z_text)` of one micro-batch. It runs twice
            with the same key, so dropout and patch dropout draw the same masks both times.
        loss: `loss(params, z_image, z_text)` over the embeddings of all micro-batches; it may use
            parameters of its own, such as scale and bias. It must not depend on the order of pairs.
        has_aux: `loss` returns (loss, auxiliary values), as in `jax.value_and_grad`.

    Returns:
        a function of `params`, the micro-batches as one tree of arrays (k, b / k, ...), and k keys;
        it returns the loss and the gradient of `params`.

    Raises:
        ConfigError: the leading axes differ.

    Source: arXiv:2101.06983.

    Example:
        >>> from vlm.losses import cached_value_and_grad, softmax_loss
        >>> embed = lambda params, batch, key: (batch @ params, batch)
        >>> loss = lambda params, z_image, z_text: softmax_loss(z_image, z_text, jnp.log(10.0))
        >>> batches = jnp.eye(4).reshape(2, 2, 4)  # four pairs as two micro-batches
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> value, gradient = cached_value_and_grad(embed, loss)(jnp.eye(4), batches, keys)
        >>> gradient.shape
        (4, 4)
    """

    def value_and_grad(params, micro_batches, keys):
        _check_leading_axes(micro_batches, keys)

        def loss_of(params):
            return loss(params, *join_batch(cached_embed(embed)(params, micro_batches, keys)))

        return jax.value_and_grad(loss_of, has_aux=has_aux)(params)

    return value_and_grad


def cached_embed(embed: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """Make a function that embeds micro-batches in turn, and each again in its backward pass."""
    again = jax.checkpoint(embed, prevent_cse=False)

    def embed_all(params, micro_batches, keys):
        return lax.scan(lambda _, x: (None, again(params, *x)), None, (micro_batches, keys))[1]

    return embed_all


def split_batch(batch: Any, count: int) -> Any:
    """Split arrays (b, ...) into (count, b / count, ...).

    Every `count`-th row goes to the same micro-batch, so rows stay on their devices.
    """
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def join_batch(parts: Any) -> Any:
    """Undo `split_batch`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)


def _check_leading_axes(micro_batches, keys):
    lengths = {len(x) for x in jax.tree.leaves(micro_batches)}
    if lengths != {len(keys)}:
        raise ConfigError(
            f"micro-batches of leading axes {sorted(lengths)} do not match {len(keys)} keys: stack "
            "k micro-batches along the first axis of every array and split k keys"
        )
