"""Base of convolutional towers: the loop over stages, and the embedding of the pooled image."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from vlm.nn.auto_axes import auto_axes
from vlm.nn.intermediates import Intermediates, capture


class ConvTower(nnx.Module):
    """Map normalised images to embeddings (not unit norm): a stem, stages, a mean, a projection.

    A tower sets `projection` and `dtype`, and `stages` with `_first_layers`, or its `_positions`.
    """

    stages: Any
    projection: Any  # None: the tower has none
    dtype: Any

    @auto_axes
    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        *,
        keys: Key[Array, " b"] | None = None,
        intermediates: Intermediates | None = None,
    ) -> Float[Array, "b e"]:
        """Embed images deterministically; `intermediates` capture the output of each stage."""
        x = self._positions(images, keys, intermediates).astype(jnp.float32)
        return self._embedding(self._pooled(x))

    @auto_axes
    def dense(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n e"]:
        """Embed each position as if it were the pooled image."""
        x = self._positions(images, None, None).astype(jnp.float32)
        return self._embedding(x.reshape(x.shape[0], -1, x.shape[-1]))

    def _positions(self, images, keys, intermediates: Intermediates | None) -> Array:
        """Run the stages: an array of (batch, *positions, channels)."""
        x = self._first_layers(images.astype(self.dtype))
        for number, stage in enumerate(self.stages):
            x = capture(intermediates, f"stages/{number}", stage(x))
        return x

    def _first_layers(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b p q c"]:
        raise NotImplementedError

    def _pooled(self, x: Float[Array, "b *n c"]) -> Float[Array, "b c"]:
        return x.mean(tuple(range(1, x.ndim - 1)))

    def _embedding(self, x: Float[Array, "*b c"]) -> Float[Array, "*b e"]:
        return x if self.projection is None else self.projection(x.astype(self.dtype))
