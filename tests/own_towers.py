"""Towers of a user: plain `flax.nnx` modules that know nothing of vlm, and wrong ones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import vlm
from vlm import bundle
from vlm.config import Code, ModelConfig, PreprocessConfig, TextModuleConfig, VisionModuleConfig
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import train_bpe
from vlm.models.dual_encoder import DualEncoder


class Scale(nnx.Variable):
    """A constant of the tower, which is saved with the model and not trained."""


class ConvNet(nnx.Module):
    """Convolutions of stride 2, mean pooling and a projection."""

    def __init__(self, embed_dim: int, *, widths: tuple[int, ...] = (8, 16), rngs: nnx.Rngs):
        sizes = (3, *widths)
        self.layers = nnx.List(
            nnx.Conv(i, o, (3, 3), strides=2, rngs=rngs)
            for i, o in zip(sizes, widths, strict=False)
        )
        self.scale = Scale(jnp.full((), 2.0))
        self.projection = nnx.Linear(widths[-1], embed_dim, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.scale[...] * self.projection(x.mean((1, 2)))


class Lstm(nnx.Module):
    """A recurrent text tower, with dropout in training."""

    def __init__(self, embed_dim: int, *, vocab_size: int, width: int = 16, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(vocab_size, width, rngs=rngs)
        self.rnn = nnx.RNN(nnx.LSTMCell(width, width, rngs=rngs), rngs=False)
        self.projection = nnx.Linear(width, embed_dim, rngs=rngs)

    def __call__(self, tokens: jax.Array, *, keys: jax.Array | None = None) -> jax.Array:
        x = self.embedding(tokens)
        if keys is not None:
            kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.9, x.shape[1:]))(keys)
            x = jnp.where(kept, x / 0.9, 0.0)
        states: Any = self.rnn(x, rngs=nnx.Rngs(0))
        return self.projection(states[:, -1])


class Stacked(nnx.Module):
    """Residual MLPs in one stack, as vlm's own towers have them."""

    def __init__(self, embed_dim: int, *, depth: int = 3, execution, rngs: nnx.Rngs):
        self.execution = execution
        options = {"dtype": execution.dtype}
        self.stem = nnx.Linear(48, 16, **options, rngs=rngs)
        self.blocks = vlm.nn.stack_blocks(
            lambda rngs: nnx.Linear(16, 16, **options, rngs=rngs), depth, rngs
        )
        self.projection = nnx.Linear(16, embed_dim, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.stem(images.reshape(len(images), -1, 48))
        x = vlm.nn.run_stacked(self.blocks, x, lambda block, x: x + block(x), self.execution)
        return self.projection(x.mean(1))


class Normed(nnx.Module):
    """With batch statistics."""

    def __init__(self, embed_dim: int, *, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(3, rngs=rngs)


class Random(nnx.Module):
    """With its own generator."""

    def __init__(self, embed_dim: int, *, rngs: nnx.Rngs):
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


class Counter(nnx.Module):
    """With an integer parameter."""

    def __init__(self, embed_dim: int, *, rngs: nnx.Rngs):
        self.count = nnx.Param(jnp.zeros((), jnp.int32))


class Broken(nnx.Module):
    """Its constructor or its call fails."""

    def __init__(self, embed_dim: int, *, where: str, rngs: nnx.Rngs):
        self.where, self.embed_dim = where, embed_dim
        self.blocks = nnx.Linear(4, 8, rngs=rngs) if where == "blocks" else None
        if where == "constructor":
            raise ValueError("no such backbone")

    def __call__(self, images: jax.Array):
        if self.where == "call":
            return images @ jnp.zeros((7, 7))
        if self.where == "integers":
            return jnp.zeros((len(images), self.embed_dim), jnp.int32)
        return images.mean((1, 2)) if self.where == "shape" else None


def not_a_module(embed_dim: int, *, rngs: nnx.Rngs):
    return None


VISION = VisionModuleConfig(
    Code.of(ConvNet),
    (("widths", (8, 16)),),
    image_size=16,
    partition=(
        (r"layers/\d+/kernel", (None, None, None, "tensor")),
        ("projection/kernel", ("fsdp", None)),
    ),
)
TEXT = TextModuleConfig(
    Code.of(Lstm),
    (("vocab_size", 280),),
    vocab_size=280,
    context_length=12,
    partition=(("embedding/.*", ("tensor", None)),),
)
MODEL = ModelConfig(VISION, TEXT, embed_dim=16)
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
WORDS = ["a red square", "a green stripe", "blue"]


def small_bundle(config: ModelConfig = MODEL) -> bundle.Bundle:
    """A bundle with random weights."""
    tokenizer = train_bpe(WORDS * 3, 280, 12)
    model = DualEncoder(config, rngs=nnx.Rngs(0))
    return bundle.Bundle(model, Preprocess(PreprocessConfig(image_size=16)), tokenizer, "own")
