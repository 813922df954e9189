"""Products in float8, against the same rounding in float64 NumPy."""

import cuda
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from vlm.nn import float8


def rounded(x: np.ndarray, dtype) -> np.ndarray:
    """Round to float8 with a power of two as scale, in float64."""
    largest = float(np.abs(x).max()) / float(ml_dtypes.finfo(dtype).max)
    scale = 2.0 ** (np.floor(np.log2(largest)) + 1)
    return (x.astype(np.float64) / scale).astype(dtype).astype(np.float64) * scale


@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_a_product_and_its_gradients(size):
    """Inputs are rounded to e4m3 and the gradient to e5m2; the products are exact to float32."""
    rng = np.random.default_rng(0)
    x, kernel = size * rng.standard_normal((2, 5, 16)), rng.standard_normal((16, 8)) / size
    gradient = rng.standard_normal((2, 5, 8))
    x, kernel, gradient = (jnp.asarray(a, jnp.float32) for a in (x, kernel, gradient))
    result, pull_back = jax.vjp(float8.product, x, kernel)
    found = (result, *pull_back(gradient))
    e4m3, e5m2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
    of_x, of_kernel, of_result = (
        rounded(np.asarray(a), dtype) for a, dtype in ((x, e4m3), (kernel, e4m3), (gradient, e5m2))
    )
    want = of_x @ of_kernel, of_result @ of_kernel.T, np.einsum("bni,bno->io", of_x, of_result)
    for got, exact in zip(found, want, strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())
    assert jnp.abs(result - x @ kernel).max() > 1e-3  # it does round


def test_values_of_normal_size_keep_four_bits():
    x = np.geomspace(1.0, 2.0**13, 1000, dtype=np.float32)  # e4m3 has 2**14 between its normals
    error = np.abs(
        float8._wide(float8._rounded(jnp.asarray(x), jnp.float8_e4m3fn), x.dtype) / x - 1
    )
    assert 2**-5 < error.max() <= 2**-4


def test_zeros_stay_zero_and_infinity_is_seen():
    kernel = jnp.ones((4, 3))
    zeros = jnp.zeros((2, 4))
    np.testing.assert_array_equal(float8.product(zeros, kernel), 0)
    assert np.isnan(float8.product(zeros.at[0, 0].set(jnp.inf), kernel)).all()


def test_xla_sees_products_of_converted_and_scaled_arrays():
    """The pattern of XLA's GemmRewriter: convert, multiply by a scalar, dot."""
    x = jax.ShapeDtypeStruct((2, 16, 32), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((32, 64), jnp.bfloat16)

    def gradients(x, kernel):
        result, pull_back = jax.vjp(float8.product, x, kernel)
        return pull_back(result)

    lines = cuda.lowered(gradients, x, kernel).splitlines()
    made = {line.split(" = ")[0].strip(): line for line in lines if " = " in line}

    def origin(name: str) -> str:
        """The float8 type from which an operand of a product was made."""
        line = made[name]
        while "stablehlo.multiply" not in line:  # transposed or reshaped on the way
            line = made[line.split("stablehlo.")[1].split()[1].rstrip(",")]
        of, scale = line.split("stablehlo.multiply ")[1].split(" : ")[0].split(", ")
        assert "broadcast_in_dim" in made[scale]
        assert "dims = []" in made[scale]
        return made[of].split(": (")[1].split(")")[0].rsplit("x", 1)[1].rstrip(">")

    products = [line for line in lines if "stablehlo.dot_general" in line]
    operands = [p.split("dot_general ")[1].split(", contracting")[0].split(", ") for p in products]
    e4m3, e5m2 = "f8E4M3FN", "f8E5M2"
    found = [{origin(name) for name in pair} for pair in operands]
    assert found.count({e4m3, e5m2}) == 2
    assert found.count({e4m3}) == len(found) - 2
