"""Patches: a stem is a convolution, and patch dropout keeps count and order."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from vlm.nn.patches import (
    PatchStem,
    _halve,
    _halve_by_product,
    drop_patches,
    drop_real_patches,
)

KEYS = jax.random.split(jax.random.key(0), 8)


def test_a_conv_stem_by_products_is_the_convolution():
    x, kernel = jax.random.normal(jax.random.key(0), (2, 8, 12, 3)), jnp.ones((3, 3, 3, 5)) / 9
    kernel = kernel * jax.random.normal(jax.random.key(1), kernel.shape)
    np.testing.assert_allclose(_halve_by_product(x, kernel), _halve(x, kernel), atol=1e-5)


def test_a_linear_stem_is_a_strided_convolution():
    stem = PatchStem(4, 32, bias=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(1), (2, 16, 12, 3))
    convolved = lax.conv_general_dilated(
        images, stem.kernel[...], (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(stem(images), convolved.reshape(2, 12, 32), atol=1e-5)


def test_dropped_patches_leave_the_others_in_order():
    tokens = jnp.broadcast_to(jnp.arange(20.0)[None, :, None], (8, 20, 3))
    kept = drop_patches(tokens, 0.75, KEYS)
    assert kept.shape == (8, 5, 3)
    assert (np.diff(kept[..., 0], axis=1) > 0).all()
    assert len({tuple(row) for row in np.asarray(kept[..., 0]).tolist()}) > 1  # each its own


def test_every_patch_is_kept_equally_often():
    keys = jax.random.split(jax.random.key(3), 4000)
    tokens = jnp.broadcast_to(jnp.arange(8.0)[None, :, None], (4000, 8, 1))
    kept = np.asarray(drop_patches(tokens, 0.5, keys)).astype(int)
    counts = np.bincount(kept.ravel(), minlength=8)
    assert (np.abs(counts - 2000) < 5 * np.sqrt(1000)).all()  # five standard deviations


def test_without_keys_or_rate_all_patches_stay():
    tokens = jnp.ones((2, 9, 3))
    assert drop_patches(tokens, 0.5, None) is tokens
    assert drop_patches(tokens, 0.0, KEYS[:2]) is tokens


def test_padding_is_never_kept_in_place_of_a_patch():
    counts = np.array([1, 2, 5, 8, 12, 16, 20, 20])
    mask = jnp.arange(20) < counts[:, None]
    tokens = jnp.broadcast_to(jnp.arange(20.0)[None, :, None], (8, 20, 3))
    kept, real = map(np.asarray, drop_real_patches(tokens, mask, 0.75, KEYS))
    assert kept.shape == (8, 5, 3)
    np.testing.assert_array_equal(real.sum(1), [1, 1, 1, 2, 3, 4, 5, 5])  # a quarter, and one
    for row, which, count in zip(kept[..., 0], real, counts, strict=True):
        assert len(set(row[which])) == which.sum()  # each once
        assert (row[which] < count).all()
    assert set(kept[6, :, 0]) != set(kept[7, :, 0])  # each image's own
    assert drop_real_patches(tokens, mask, 0.75, None) == (tokens, mask)
