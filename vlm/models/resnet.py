"""The image tower of OpenAI's first CLIP models: a ResNet with an attention pool."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from vlm.config import VisionConfig
from vlm.nn.attention import Attention
from vlm.nn.resnet import EXPANSION, Bottleneck, FrozenBatchNorm, average_pool, conv
from vlm.nn.transformer import Execution


class ResNetTower(nnx.Module):
    """Normalised images to embeddings of `embed_dim` dimensions (not yet of unit norm).

    `width` is the stem's, `heads` the attention pool's, and a token of that pool is 32 pixels wide
    (Radford et al., 2021, arXiv:2103.00020, section 2.4).
    """

    def __init__(
        self, config: VisionConfig, embed_dim: int, *, execution: Execution, rngs: nnx.Rngs
    ):
        c, dtype = config, execution.dtype
        self.config = config
        self.dtype = dtype
        half = c.width // 2
        self.stem = nnx.List(
            [
                conv(3, half, 3, strides=2, dtype=dtype, rngs=rngs),
                conv(half, half, 3, dtype=dtype, rngs=rngs),
                conv(half, c.width, 3, dtype=dtype, rngs=rngs),
            ]
        )
        self.stem_norms = nnx.List([FrozenBatchNorm(w) for w in (half, half, c.width)])
        inputs, stages = c.width, []
        for stage, depth in enumerate(c.resnet):
            width = c.width * 2**stage
            blocks = []
            for number in range(depth):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(Bottleneck(inputs, width, stride, dtype=dtype, rngs=rngs))
                inputs = width * EXPANSION
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        count = (c.image_size // 32) ** 2 + 1
        normal = nnx.initializers.normal(inputs**-0.5)
        self.position = nnx.Param(normal(rngs.params(), (count, inputs)))
        self.pool = Attention(inputs, c.heads, output_width=embed_dim, dtype=dtype, rngs=rngs)

    def __call__(
        self, images: Float[Array, "b h w 3"], *, keys: Key[Array, "b"] | None = None
    ) -> Float[Array, "b e"]:
        """Embed images; nothing here is random."""
        x = images.astype(self.dtype)
        for layer, norm in zip(self.stem, self.stem_norms, strict=True):
            x = jax.nn.relu(norm(layer(x)))
        x = average_pool(x, 2)
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
        x = x + self.position[...].astype(x.dtype)
        return self.pool(x[:, :1], x)[:, 0]
