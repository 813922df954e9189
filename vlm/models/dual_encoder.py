"""Dual encoder: two towers with a shared embedding space, logit scale and logit bias."""

import math
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from vlm.config import ModelConfig, TextModuleConfig, VisionModuleConfig
from vlm.models.modules import call_module
from vlm.models.towers import text_tower, vision_tower
from vlm.nn.intermediates import Intermediates
from vlm.nn.layers import split_keys
from vlm.nn.naflex import Patches
from vlm.nn.transformer import Execution


class DualEncoder(nnx.Module):
    """CLIP- or SigLIP-class model (arXiv:2103.00020, arXiv:2303.15343).

    logits = exp(logit_scale) * z_image z_text^T + logit_bias, for unit-norm embeddings.

    Example:
        >>> from flax import nnx
        >>> encoder = vlm.models.DualEncoder(experiment.model, rngs=nnx.Rngs(0))
        >>> encoder.encode_image(jnp.zeros((2, 16, 16, 3))).shape
        (2, 16)
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        execution: Execution = Execution(),  # noqa: B008 (frozen)
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.vision = vision_tower(config.vision, config.tower_dim, execution=execution, rngs=rngs)
        self.text = text_tower(config.text, config.tower_dim, execution=execution, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(math.log(config.init_scale), jnp.float32))
        bias = config.init_bias
        self.logit_bias = None if bias is None else nnx.Param(jnp.asarray(bias, jnp.float32))

    def encode_image(
        self,
        images: Float[Array, "b *f h w 3"] | Patches,
        *,
        keys: Key[Array, " b"] | None = None,
        intermediates: Intermediates | None = None,
    ) -> Float[Array, "b *v e"]:
        """Map normalised images to unit-norm float32 embeddings; fill `intermediates`.

        A tower of videos takes (b, frames, h, w, 3). One with a Q-Former gives several vectors.
        """
        return self._embed("vision", images, keys=keys, intermediates=intermediates)

    def encode_text(
        self,
        tokens: Int[Array, "b n"],
        *,
        keys: Key[Array, " b"] | None = None,
        intermediates: Intermediates | None = None,
    ) -> Float[Array, "b e"]:
        """Map token ids to unit-norm float32 embeddings; fill `intermediates`."""
        return self._embed("text", tokens, keys=keys, intermediates=intermediates)

    def encode_text_with_context(
        self,
        tokens: Int[Array, "b n"],
        contexts: Float[Array, "b k w"],
        positions: Int[Array, "b k"],
    ) -> Float[Array, "b e"]:
        """Embed token ids with vectors in place of the token embeddings at `positions` (CoOp)."""
        return self._embed("text", tokens, context=(contexts, positions))

    def dense(self, name: Literal["vision", "text"], inputs: Any) -> Float[Array, "b n e"]:
        """Unit-norm embeddings of each position of an image or token of a text: see the towers'."""
        z = getattr(self, name).dense(inputs)
        return unit_norm(z[..., : self.config.embed_dim])

    def __call__(
        self,
        images: Float[Array, "b h w 3"] | Patches,
        tokens: Int[Array, "b n"],
        *,
        keys: Key[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b *v e"], Float[Array, "b e"]]:
        """Embed images and texts of a batch; `keys`, one per example, turn dropout on."""
        image_keys, text_keys = split_keys(keys)
        return self.encode_image(images, keys=image_keys), self.encode_text(tokens, keys=text_keys)

    def _embed(self, name: Literal["vision", "text"], inputs: Any, **options: Any):
        tower, config = getattr(self, name), getattr(self.config, name)
        if isinstance(config, VisionModuleConfig | TextModuleConfig):
            z = call_module(tower, config, self.config.tower_dim, inputs, **options)
        else:
            z = tower(inputs, **options)
        return unit_norm(z[..., : self.config.embed_dim])


def unit_norm(x: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
    """Normalise `x` to unit norm in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
