"""Depthwise convolutions in a CPU's form: the same numbers, and computed once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vlm.nn.conv import Conv, _convolve, _shift_and_add
from vlm.nn.layers import LayerNorm, Mlp, by_rows


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("size", "edges"), [(3, (1, 1)), (7, (3, 3)), (3, (0, 1))])
@pytest.mark.parametrize("outputs", [6, 12])
def test_it_agrees_with_xlas_convolution(stride, size, edges, outputs):
    rng = np.random.default_rng(size)
    x = rng.normal(size=(2, 9, 8, 6)).astype(np.float32)
    kernel = rng.normal(size=(size, size, 1, outputs)).astype(np.float32)

    def values(form):
        run = functools.partial(form, stride=stride, edges=edges)
        y, back = jax.vjp(run, jnp.asarray(x), jnp.asarray(kernel))
        return y, *back(jnp.cos(y))

    for ours, xlas in zip(values(_shift_and_add), values(_convolve), strict=True):
        np.testing.assert_allclose(ours, xlas, atol=5e-5)


def test_numbers_that_are_none_stay_none():
    kernel = jnp.ones((3, 3, 1, 2)).at[0, 0, 0, 0].set(jnp.nan)
    y = _shift_and_add(jnp.ones((1, 4, 4, 2)), kernel, stride=1, edges=(1, 1))
    assert np.isnan(y).any()


def test_its_readers_do_not_compute_it_again():
    rngs = nnx.Rngs(0)
    conv, norm = Conv(32, 32, 7, dtype=jnp.float32, rngs=rngs), LayerNorm(32, 1e-6, rngs=rngs)
    x = jnp.ones((2, 12, 12, 32))
    compiled = jax.jit(lambda x: norm(conv(x))).lower(x).compile()
    products = 2 * 49 * x.size
    assert products <= compiled.cost_analysis()["flops"] < 1.5 * products


def test_rows_on_one_axis_give_the_same():
    mlp = Mlp(8, 16, "gelu", dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 8))
    np.testing.assert_allclose(by_rows(mlp, x), mlp(x), atol=1e-6)
