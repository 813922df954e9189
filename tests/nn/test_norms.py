"""Layer normalisation of 16-bit inputs against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vlm.nn.layers import LayerNorm


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("mean", [0, 30, 1000])
def test_layer_norm_of_inputs_far_from_zero_is_float64s(dtype, mean):
    norm = LayerNorm(768, 1e-6, rngs=nnx.Rngs(0))
    x, cotangent = np.random.default_rng(0).normal(size=(2, 64, 768))
    x = jnp.asarray(mean + 20 * x, dtype)
    y, pull = jax.vjp(norm, x)
    (dx,) = pull(jnp.asarray(cotangent, dtype))

    wide, g = np.float64(x), np.float64(jnp.asarray(cotangent, dtype))
    normed = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    projected = g - g.mean(-1, keepdims=True) - normed * (g * normed).mean(-1, keepdims=True)
    wanted = projected / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    rounding = float(jnp.finfo(dtype).eps) + 1e-5
    np.testing.assert_allclose(np.float64(y), normed, rtol=rounding, atol=2e-5)
    np.testing.assert_allclose(np.float64(dx), wanted, rtol=rounding, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_layer_norm_of_equal_numbers_is_finite(dtype):
    norm = LayerNorm(768, 1e-6, rngs=nnx.Rngs(0))
    x = jnp.full((1, 768), 1000, dtype)
    y, pull = jax.vjp(norm, x)
    assert np.isfinite(np.float32(y)).all()
    assert np.isfinite(np.float32(pull(jnp.ones_like(y))[0])).all()
