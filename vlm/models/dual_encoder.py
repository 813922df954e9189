"""Two towers into one space, and the temperature and bias of the logits between them."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vlm.config import ModelConfig
from vlm.models.text import TextTower
from vlm.models.vision import VisionTower
from vlm.nn.transformer import Execution


class DualEncoder(nnx.Module):
    """A CLIP- or SigLIP-class model (arXiv:2103.00020, arXiv:2303.15343).

    logits = exp(logit_scale) * z_image z_text^T + logit_bias, for unit-norm embeddings.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        execution: Execution = Execution(),  # noqa: B008 (frozen)
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.vision = VisionTower(config.vision, config.embed_dim, execution=execution, rngs=rngs)
        self.text = TextTower(config.text, config.embed_dim, execution=execution, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(math.log(config.init_scale), jnp.float32))
        bias = config.init_bias
        self.logit_bias = None if bias is None else nnx.Param(jnp.asarray(bias, jnp.float32))

    def encode_image(
        self, images: Float[Array, "b h w 3"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "b e"]:
        """Normalised images to unit-norm float32 embeddings."""
        return unit_norm(self.vision(images, key=key))

    def encode_text(
        self, tokens: Int[Array, "b n"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "b e"]:
        """Token ids to unit-norm float32 embeddings."""
        return unit_norm(self.text(tokens, key=key))

    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        tokens: Int[Array, "b n"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "b e"], Float[Array, "b e"]]:
        """Embed both halves of a batch. With a `key`, dropout and patch dropout are on."""
        image_key, text_key = (None, None) if key is None else jax.random.split(key)
        return self.encode_image(images, key=image_key), self.encode_text(tokens, key=text_key)


def unit_norm(x: Float[Array, "b e"]) -> Float[Array, "b e"]:
    """`x` in float32 at length one."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
