"""Matrix products of linear layers on CPUs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm.nn.layers import _product


@pytest.mark.parametrize(("i", "o"), [(24, 8), (8, 24), (8, 8)])
def test_gradients_are_those_of_a_matrix_product(i, o):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 5, i)), rng.standard_normal((i, o))
    g = rng.standard_normal((2, 5, o))
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, kernel)]
    y, backward = jax.vjp(_product, *arrays)
    dx, dkernel = backward(jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(y, x @ kernel, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, g @ kernel.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dkernel, np.einsum("bni,bno->io", x, g), rtol=1e-5, atol=1e-5)
    ones = [jnp.ones_like(a) for a in arrays]
    _, tangent = jax.jvp(_product, arrays, ones)
    np.testing.assert_allclose(tangent, x @ ones[1] + ones[0] @ kernel, rtol=1e-5, atol=1e-5)


def products(function, *arrays) -> list[str]:
    """Shapes of the products of a compiled function."""
    program = str(jax.jit(function).lower(*arrays).compile().as_text())
    return re.findall(r"= f32\[([\d,]+)\]\S* dot\(", program)


def test_the_narrower_factor_of_a_kernel_gradient_is_on_the_left():
    x, kernel, g = jnp.ones((64, 24)), jnp.ones((24, 8)), jnp.ones((64, 8))

    def gradient(x, kernel, g):
        return jax.vjp(lambda kernel: _product(x, kernel), kernel)[1](g)[0]

    assert products(gradient, x, kernel, g) == ["8,24"]
    assert products(gradient, g, kernel.T, x) == ["8,24"]


def test_a_kernel_without_gradient_costs_no_product():
    x, kernel, g = jnp.ones((64, 24)), jnp.ones((24, 8)), jnp.ones((64, 8))

    def gradient(x, kernel, g):
        return jax.vjp(lambda x: _product(x, kernel), x)[1](g)[0]

    assert products(gradient, x, kernel, g) == ["64,24"]
