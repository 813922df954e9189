"""Depthwise convolutions in a CPU's form: the same numbers, and computed once."""

import functools
import time

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


@pytest.mark.parametrize("spoiled", ["image", "kernel"])
def test_numbers_that_are_none_stay_where_they_are(spoiled):
    x, kernel = jnp.ones((2, 4, 4, 2)), jnp.ones((3, 3, 1, 2))
    if spoiled == "image":
        x = x.at[0, 0, 0, 0].set(jnp.nan)
    else:
        kernel = kernel.at[0, 0, 0, 0].set(jnp.nan)
    ours, xlas = (f(x, kernel, stride=1, edges=(1, 1)) for f in (_shift_and_add, _convolve))
    np.testing.assert_allclose(ours, xlas)
    assert np.isnan(ours).any()


def test_its_readers_do_not_compute_it_again():
    """A norm's sums did, six times over: the best of many turns tells it on a busy machine too."""
    rngs = nnx.Rngs(0)
    conv, norm = Conv(128, 128, 7, dtype=jnp.float32, rngs=rngs), LayerNorm(128, 1e-6, rngs=rngs)
    runs = [jax.jit(conv), jax.jit(lambda x: norm(conv(x)))]
    x, best = jnp.ones((2, 56, 56, 128)), [float("inf")] * 2
    for _ in range(10):
        for i, run in enumerate(runs):
            began = time.perf_counter()
            jax.block_until_ready(run(x))
            best[i] = min(best[i], time.perf_counter() - began)
    assert best[1] < 3 * best[0]


def test_rows_on_one_axis_give_the_same():
    mlp = Mlp(8, 16, "gelu", dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 8))
    np.testing.assert_allclose(by_rows(mlp, x), mlp(x), atol=1e-6)
