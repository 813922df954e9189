"""X-CLIP (Ni et al., 2022, arXiv:2208.02816): CLIP for videos.

In every block each frame sends a message to the others. The multi-frame integration transformer
(MIT) makes one embedding of the frames'. The features of the video's patches then change the text
embeddings that it is compared with.
"""

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from vlm.config import XCLIPConfig
from vlm.nn.attention import Attention, attend
from vlm.nn.auto_axes import auto_axes
from vlm.nn.layers import LayerNorm, Linear, Mlp, linear
from vlm.nn.patches import PatchStem
from vlm.nn.transformer import Block, Execution, Transformer, block_flops, run_stacked, stack_blocks


class XCLIPTower(nnx.Module):
    """Map normalised videos (b, f, h, w, 3) to embeddings of `embed_dim` dimensions."""

    def __init__(
        self, config: XCLIPConfig, embed_dim: int, *, execution: Execution, rngs: nnx.Rngs
    ):
        c, options = config, {"dtype": execution.dtype, "rngs": rngs}
        self.config, self.execution = config, execution
        self.stem = PatchStem(c.patch_size, c.width, bias=False, **options)
        normal = nnx.initializers.normal(c.width**-0.5)
        self.class_token = nnx.Param(normal(rngs.params(), (c.width,)))
        self.position = nnx.Param(normal(rngs.params(), (c.tokens() - 1, c.width)))
        self.pre_norm = LayerNorm(c.width, c.norm_eps, rngs=rngs)
        self.blocks = stack_blocks(
            lambda rngs: FrameBlock(c, dtype=execution.dtype, rngs=rngs), c.depth, rngs
        )
        self.norm = LayerNorm(c.width, c.norm_eps, rngs=rngs)
        self.projection = Linear(c.width, embed_dim, use_bias=False, **options)
        self.frame_position = nnx.Param(normal(rngs.params(), (c.frames, embed_dim)))
        self.frame_transformer = Transformer(
            embed_dim,
            c.frame_depth,
            c.frame_heads,
            c.frame_mlp_dim,
            act=c.activation,
            norm_eps=c.norm_eps,
            execution=execution,
            rngs=rngs,
        )
        self.patch_norm = LayerNorm(c.width, c.norm_eps, rngs=rngs)
        self.patch_projection = Linear(c.width, embed_dim, use_bias=False, **options)
        self.context_norm = LayerNorm(embed_dim, c.norm_eps, rngs=rngs)
        self.prompts = stack_blocks(
            lambda rngs: PromptBlock(c, embed_dim, dtype=execution.dtype, rngs=rngs),
            c.prompt_depth,
            rngs,
        )
        self.prompt_scale = nnx.Param(jnp.full(embed_dim, 0.1))

    @auto_axes
    def __call__(
        self, videos: Float[Array, "b f h w 3"], *, keys: Key[Array, " b"] | None = None, **_
    ) -> Float[Array, "b e"]:
        """Embed videos; there is no dropout, and so no use of `keys`."""
        return self._frames_to_video(self._frames(videos))

    @auto_axes
    def features(
        self, videos: Float[Array, "b f h w 3"]
    ) -> tuple[Float[Array, "b e"], Float[Array, "b n e"]]:
        """Embed videos; also return the context that prompts attend to, n vectors for each."""
        x = self._frames(videos)
        patches = self.patch_projection(self.patch_norm(x[:, :, 1:]))
        return self._frames_to_video(x), self.context_norm(patches.mean(1))

    @auto_axes
    def prompted(
        self, texts: Float[Array, "m e"], context: Float[Array, "b n e"]
    ) -> Float[Array, "b m e"]:
        """Change text embeddings (not unit norm) by the context of each video."""
        x = jnp.broadcast_to(texts, (len(context), *texts.shape))
        step = lambda block, x: block(x, context)  # noqa: E731
        y = run_stacked(self.prompts, x, step, self.execution)
        return x + self.prompt_scale[...].astype(y.dtype) * y

    def _frames(self, videos: Float[Array, "b f h w 3"]) -> Float[Array, "b f n d"]:
        """Return the tokens of each frame after the blocks: the class token and the patches."""
        b, f = videos.shape[:2]
        x = self.stem(videos.reshape(b * f, *videos.shape[2:]))
        token = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (b * f, 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=1) + self.position[...].astype(x.dtype)
        x = self.pre_norm(x).reshape(b, f, -1, x.shape[-1])
        return run_stacked(self.blocks, x, lambda block, x: block(x), self.execution)

    def _frames_to_video(self, x: Float[Array, "b f n d"]) -> Float[Array, "b e"]:
        z = self.projection(self.norm(x[:, :, 0]))
        y = self.frame_transformer(z + self.frame_position[...].astype(z.dtype))
        return (y + z).mean(1)


class FrameBlock(nnx.Module):
    """Block of a frame's tokens and a message, which is from all frames' class tokens."""

    def __init__(self, config: XCLIPConfig, *, dtype, rngs: nnx.Rngs):
        c, options = config, {"dtype": dtype, "rngs": rngs}
        self.message = Linear(c.width, c.width, **options)
        self.message_norm = LayerNorm(c.width, c.norm_eps, rngs=rngs)
        self.message_attention = Attention(c.width, c.heads, **options)
        self.block = Block(
            c.width, c.heads, c.mlp_dim, act=c.activation, norm_eps=c.norm_eps, **options
        )

    def __call__(self, x: Float[Array, "b f n d"]) -> Float[Array, "b f n d"]:
        message = self.message(x[:, :, 0])
        message = message + self.message_attention(self.message_norm(message))
        x = jnp.concatenate([x, message[:, :, None]], axis=2)
        return self.block(x.reshape(-1, *x.shape[2:]), None, None).reshape(x.shape)[:, :, :-1]


class PromptBlock(nnx.Module):
    """Cross-attention from texts to the context of their video, and an MLP."""

    def __init__(self, config: XCLIPConfig, width: int, *, dtype, rngs: nnx.Rngs):
        c, options = config, {"dtype": dtype, "rngs": rngs}
        shape = (c.prompt_heads, width // c.prompt_heads)
        project = functools.partial(nnx.LinearGeneral, width, shape, use_bias=False, **options)
        self.query, self.key, self.value = project(), project(), project()
        self.out = Linear(width, width, **options)
        self.attention_norm = LayerNorm(width, c.norm_eps, rngs=rngs)
        self.mlp_norm = LayerNorm(width, c.norm_eps, rngs=rngs)
        self.mlp = Mlp(width, 4 * width, c.activation, **options)

    def __call__(
        self, x: Float[Array, "b m e"], context: Float[Array, "b n e"]
    ) -> Float[Array, "b m e"]:
        heads = self.query.kernel.shape[-2:]
        y = self.attention_norm(x)
        pairs = (self.query, y), (self.key, context), (self.value, context)
        y = attend(*(linear(layer, t).reshape(*t.shape[:2], *heads) for layer, t in pairs))
        x = x + self.out(y.reshape(x.shape))
        return x + self.mlp(self.mlp_norm(x))


def flops(config: XCLIPConfig, embed_dim: int, *, training: bool = False) -> dict[str, float]:
    """Forward FLOPs of one video, by part, without prompts: stem, projections, scores, ..."""
    c = config
    frame = block_flops(c, c.tokens())
    messages = c.depth * 2 * c.frames * (5 * c.width**2 + 2 * c.frames * c.width)
    over_frames = c.frame_depth * 2 * c.frames
    over_frames *= 4 * embed_dim**2 + 2 * c.frames * embed_dim + 2 * embed_dim * c.frame_mlp_dim
    return {
        "stem": 2 * c.frames * (c.tokens() - 2) * c.patch_size**2 * 3 * c.width,
        **{name: c.frames * value for name, value in frame.items()},
        "messages": messages,
        "frames": over_frames,
        "projection": 2 * c.frames * c.width * embed_dim,
    }
