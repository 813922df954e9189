"""Scanned blocks: the same function however it is computed, and causal where it says so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vlm.config import MeshConfig
from vlm.nn.transformer import Execution, Transformer
from vlm.sharding import batch_sharding, make_mesh, shardings

X = jax.random.normal(jax.random.key(0), (4, 6, 32))
KEYS = jax.random.split(jax.random.key(1), 4)


def build(key, *, causal=False, dropout_rate=0.0, norm="pre", **execution) -> Transformer:
    return Transformer(
        32,
        2,
        2,
        64,
        act="gelu_tanh",
        norm_eps=1e-6,
        dropout_rate=dropout_rate,
        causal=causal,
        norm=norm,
        execution=Execution(**execution),
        rngs=nnx.Rngs(key),
    )


def make(**settings):
    """A stack of random weights as one program, `stack(x, mask=None, keys=None)`."""
    run = jax.jit(lambda key, x, mask, keys: build(key, **settings)(x, mask, keys=keys))
    return lambda x, mask=None, keys=None: run(jax.random.key(0), x, mask, keys)


def value_and_gradients(**settings):
    graph = nnx.graphdef(nnx.eval_shape(lambda: build(jax.random.key(0), **settings)))
    parameters = jax.jit(lambda key: nnx.state(build(key)))(jax.random.key(0))

    @jax.jit
    @jax.value_and_grad
    def loss(parameters):
        return jnp.square(nnx.merge(graph, parameters)(X, keys=KEYS) - 1).mean()

    return loss(parameters)


@functools.cache
def plain(norm):
    return value_and_gradients(dropout_rate=0.2, norm=norm)


@pytest.mark.parametrize(
    ("norm", "remat", "scan"),
    [
        ("pre", "none", False),
        ("pre", "full", True),
        ("pre", "full", False),
        ("pre", "dots", True),
        ("pre", "dots_no_batch", True),
        ("post", "full", True),
        ("post", "dots", False),
    ],
)
def test_remat_and_unrolling_change_nothing(norm, remat, scan):
    got = value_and_gradients(dropout_rate=0.2, norm=norm, remat=remat, scan=scan)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(plain(norm)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_causal_stack_never_looks_ahead():
    stack = make(causal=True)
    # Not a constant: the norm before each branch would take it away.
    changed = X.at[:, 4:].multiply(jnp.linspace(-1, 1, X.shape[-1]))
    before, after = stack(X), stack(changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before[:, 4:] - after[:, 4:]).max() > 1e-3
    sees = make()
    assert np.abs(sees(X)[:, :4] - sees(changed)[:, :4]).max() > 1e-3


def test_masked_tokens_are_invisible():
    stack = make()
    mask = jnp.arange(6) < 4
    before = stack(X, mask[None, None, None, :])
    after = stack(X.at[:, 4:].add(1.0), mask[None, None, None, :])
    np.testing.assert_array_equal(before[:, :4], after[:, :4])


def test_bfloat16_is_near_float32():
    wide, narrow = make()(X), make(dtype=jnp.bfloat16)(X.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16
    # Two blocks of rounding to 8 bits: 2^-8 a step, relative to outputs of order 1.
    assert np.abs(wide - narrow.astype(jnp.float32)).mean() < 2e-2


def test_an_example_draws_the_same_mask_in_any_batch():
    stack = make(dropout_rate=0.5)
    whole = stack(X, keys=KEYS)
    part = stack(X[2:], keys=KEYS[2:])
    np.testing.assert_allclose(whole[2:], part, atol=1e-6)
    assert np.abs(whole - stack(X, keys=KEYS[::-1])).max() > 1e-2


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_parameters_cut_over_fsdp_compute_the_same_in_bfloat16(remat, monkeypatch):
    """Every device works on the same rows either way, with the same parameters to the bit."""
    monkeypatch.setattr("vlm.sharding.SMALLEST_SHARDED", 256)  # even the scales of norms are cut
    rows = jax.random.normal(jax.random.key(2), (8, 6, 256), jnp.bfloat16)
    stack = Transformer(
        256,
        2,
        4,
        256,
        act="gelu_tanh",
        norm_eps=1e-6,
        execution=Execution(dtype=jnp.bfloat16, remat=remat),
        rngs=nnx.Rngs(0),
    )
    graph, parameters = nnx.split(stack)
    parameters = nnx.to_pure_dict(parameters)
    scale = parameters["blocks"]["attention_norm"]["scale"]
    parameters["blocks"]["attention_norm"]["scale"] = scale + jnp.linspace(0, 1e-3, 256)

    @jax.jit
    @jax.value_and_grad
    def loss(parameters, rows):
        return jnp.square(nnx.merge(graph, parameters)(rows).astype(jnp.float32)).mean()

    (value, gradients), (whole, expected) = (
        loss(
            jax.device_put(parameters, shardings(parameters, mesh)),
            jax.device_put(rows, batch_sharding(mesh)),
        )
        for mesh in (make_mesh(MeshConfig(1, 8)), make_mesh(MeshConfig(8, 1)))
    )
    specs = {x.sharding.spec for x in jax.tree.leaves(gradients["blocks"]["attention_norm"])}
    assert all("fsdp" in spec for spec in specs)
    np.testing.assert_allclose(value, whole, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02 * np.abs(b).max())  # sums in bfloat16
