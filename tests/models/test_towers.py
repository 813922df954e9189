"""The towers: shapes of every form, what they must not see, and their precision."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vlm.config import ModelConfig, TextConfig, TextPool, ViTConfig
from vlm.errors import ConfigError
from vlm.models.dual_encoder import DualEncoder
from vlm.models.text import TextTower, shortened
from vlm.models.vit import ViTTower
from vlm.models.vitamin import average_of_three
from vlm.nn.pooling import TEXT_POOLS
from vlm.nn.transformer import Execution

VISION = ViTConfig(
    image_size=16, patch_size=4, width=32, depth=2, heads=2, mlp_dim=64, projection="linear"
)
TEXT = TextConfig(
    vocab_size=50, context_length=10, width=32, depth=2, heads=2, mlp_dim=64, projection="linear"
)
IMAGES = jax.random.normal(jax.random.key(0), (3, 16, 16, 3))
# Words are 4 and up; 3 ends a text, 0 pads it.
TOKENS = jnp.array([[5, 6, 7, 3, 0, 0, 0, 0, 0, 0], [9, 3, 0, 0, 0, 0, 0, 0, 0, 0]])


def vision(dtype=jnp.float32, **changes):
    return compiled(ViTTower, dataclasses.replace(VISION, **changes), dtype)


def text(dtype=jnp.float32, **changes):
    return compiled(TextTower, dataclasses.replace(TEXT, **changes), dtype)


def compiled(tower, config, dtype):
    """A tower of random weights as one program, `embed(inputs, keys=None)`."""

    @jax.jit
    def embed(key, inputs, keys):
        built = tower(config, 24, execution=Execution(dtype=dtype), rngs=nnx.Rngs(key))
        return built(inputs, keys=keys)

    return lambda inputs, keys=None: embed(jax.random.key(0), inputs, keys)


@pytest.mark.parametrize(
    "changes",
    [
        {"pool": "class"},
        {"pool": "mean", "class_token": True},
        {"pool": "mean", "norm_pooled": True},
        {"pool": "map", "pool_heads": 4},
        {"pool": "query"},
        {"pool": "mean", "stem": "conv", "stem_widths": (8, 16)},
        {"pool": "class", "pre_norm": True, "layer_scale": True, "projection": "linear_bias"},
        {"pool": "mean", "registers": 2, "projection": "mlp_bias"},
    ],
)
def test_every_image_tower_embeds(changes):
    z = vision(**changes)(IMAGES)
    assert z.shape == (3, 24)
    assert np.isfinite(z).all()
    assert np.abs(z[0] - z[1]).max() > 1e-5  # layer scale starts small: a class token sees little


@pytest.mark.parametrize("pool", ["end", "argmax", "first", "last", "class", "mean", "max", "map"])
@pytest.mark.parametrize("pad_id", [None, 0])
def test_every_text_tower_embeds(pool, pad_id):
    z = text(pool=pool, end_id=3, pad_id=pad_id)(TOKENS)
    assert z.shape == (2, 24)
    assert np.isfinite(z).all()


@pytest.mark.parametrize(
    ("pool", "norm"),
    [
        ("mean", "pre"),
        ("max", "pre"),
        ("map", "pre"),
        ("first", "pre"),
        ("end", "pre"),
        ("mean", "post"),
    ],
)
def test_padding_is_invisible(pool, norm):
    tower = text(pool=pool, end_id=3, pad_id=0, norm=norm)
    np.testing.assert_allclose(tower(TOKENS), tower(TOKENS[:, :6]), atol=1e-5)
    seen = text(pool=pool, end_id=3, norm=norm)  # without pad_id it is a token as any other
    assert np.abs(seen(TOKENS) - seen(TOKENS[:, :6])).max() > 1e-4


def test_a_text_pooling_is_one_entry(monkeypatch):
    assert set(TEXT_POOLS) | {"map"} == set(get_args(TextPool))
    monkeypatch.setitem(TEXT_POOLS, "largest", lambda x, norm, *_: norm(x).max(1))
    config = dataclasses.replace(TEXT, projection="none", width=24)
    object.__setattr__(config, "pool", "largest")  # as if `TextPool` listed it
    tower = TextTower(config, 24, execution=Execution(), rngs=nnx.Rngs(0))
    assert tower(TOKENS).shape == (2, 24)


def test_a_post_norm_tower_pools_normalised_tokens():
    z = text(pool="first", norm="post", projection="none", width=24)(TOKENS)
    np.testing.assert_allclose(z.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(jnp.square(z).mean(1), 1, atol=1e-4)


def test_a_causal_tower_does_not_see_beyond_the_end():
    tower = text(pool="end", end_id=3, causal=True)
    other = TOKENS.at[:, 6:].set(8)
    np.testing.assert_allclose(tower(TOKENS), tower(other), atol=1e-6)


@pytest.mark.parametrize(("build", "inputs"), [(vision, IMAGES), (text, TOKENS)])
def test_bfloat16_points_the_same_way(build, inputs):
    pool = {"pool": "mean"}
    wide, narrow = build(**pool)(inputs), build(jnp.bfloat16, **pool)(inputs)
    assert narrow.dtype == jnp.bfloat16
    narrow = narrow.astype(jnp.float32)
    cosine = (
        (wide * narrow).sum(1) / jnp.linalg.norm(wide, axis=1) / jnp.linalg.norm(narrow, axis=1)
    )
    assert (cosine > 0.999).all()


def test_embeddings_have_length_one_in_float32():
    config = ModelConfig(vision=VISION, text=TEXT, embed_dim=24)

    @jax.jit
    def embed(key):
        model = DualEncoder(config, execution=Execution(dtype=jnp.bfloat16), rngs=nnx.Rngs(key))
        return model(IMAGES[:2], TOKENS)

    for z in embed(jax.random.key(0)):
        assert z.dtype == jnp.float32
        np.testing.assert_allclose(jnp.linalg.norm(z, axis=1), 1, atol=1e-6)


def test_dropout_needs_keys():
    tower = vision(pool="mean", dropout=0.5, patch_dropout=0.5)
    np.testing.assert_array_equal(tower(IMAGES), tower(IMAGES))
    keys = jax.random.split(jax.random.key(1), 3)
    assert np.abs(tower(IMAGES, keys=keys) - tower(IMAGES)).max() > 1e-2


def test_pooling_at_the_end_needs_to_know_the_end():
    with pytest.raises(ConfigError, match="needs end_id"):
        text(pool="end")(TOKENS)


def test_means_of_three_have_a_gradient_in_a_compiled_program():
    """ViTamin trains: a window's sum that starts from a traced zero could not be differentiated."""
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    gradient = jax.jit(jax.grad(lambda x: average_of_three(x).sum()))(x)
    # Each mean gives a share to what it is of: together one for each mean.
    np.testing.assert_allclose(gradient.sum(), average_of_three(x).size, rtol=1e-6)
    np.testing.assert_allclose(average_of_three(x)[0, 1, 1, 0], x[0, 1:4, 1:4, 0].mean())


@pytest.mark.parametrize("pool", ["first", "mean", "max"])
def test_padding_that_a_tower_masks_is_cut(pool):
    config = TextConfig(
        vocab_size=20, context_length=100, width=16, depth=2, heads=2, mlp_dim=32, pool=pool,
        pad_id=0, norm="post",
    )  # fmt: skip
    tower = TextTower(config, 8, execution=Execution(), rngs=nnx.Rngs(0))
    rows = np.zeros((2, 100), np.int32)
    rows[0, :17], rows[1, :5] = 3, 4
    cut = shortened(rows, config)
    assert cut.shape == (2, 32)
    assert shortened(rows, config, step=1).shape == (2, 17)
    assert np.abs(tower(jnp.asarray(cut)) - tower(jnp.asarray(rows))).max() < 1e-6
    rows[1, 99] = 4
    assert shortened(rows, config).shape == (2, 100)
    assert shortened(np.zeros((3, 100), np.int32), config, step=1).shape == (3, 1)
    unmasked = dataclasses.replace(config, pad_id=None)
    assert shortened(rows, unmasked).shape == (2, 100)
