"""The losses in tiles around a ring against their definitions in float64."""

import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlm.config import LOSS_SCORES, Loss
from vlm.errors import ConfigError, ShardingError
from vlm.losses import contrastive_loss, sigmoid_loss, softmax_loss
from vlm.losses.contrastive import LOSSES

KINDS = ("softmax", "sigmoid")
PLAIN = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}
AXES = ("data", "fsdp", "tensor")
MESHES = ((1, 1, 1), (2, 1, 1), (2, 2, 1), (4, 2, 1), (2, 2, 2), (1, 1, 8))


# ------------------------------------------------------- the definitions, in float64


def log_sum_exp(x, axis):
    top = x.max(axis, keepdims=True)
    return np.log(np.exp(x - top).sum(axis, keepdims=True)) + top


def reference(kind, z_image, z_text, logit_scale, logit_bias, groups=None):
    """Value and the four gradients, written out by hand."""
    x, y = np.asarray(z_image, np.float64), np.asarray(z_text, np.float64)
    scale, bias = math.exp(float(logit_scale)), float(logit_bias)
    b = len(x)
    logits = scale * x @ y.T + bias
    own = np.eye(b)
    if groups is not None:  # no exponential of this counts
        logits = np.where((groups[:, None] == groups) & (own == 0), -1e3, logits)
    if kind == "softmax":
        rows, columns = (log_sum_exp(logits, axis) for axis in (1, 0))
        value = (rows.sum() + columns.sum() - 2 * np.trace(logits)) / (2 * b)
        g = (np.exp(logits - rows) + np.exp(logits - columns) - 2 * own) / (2 * b)
    else:
        sign = 2 * own - 1
        value = np.logaddexp(0, -sign * logits).sum() / b
        g = -sign / (1 + np.exp(sign * logits)) / b
    return value, (scale * g @ y, scale * g.T @ x, (g * (logits - bias)).sum(), g.sum())


def relative_errors(got, true):
    errors = []
    for ours, exact in zip(jax.tree.leaves(got), jax.tree.leaves(true), strict=True):
        ours, size = np.asarray(ours, np.float64), np.linalg.norm(exact)
        # The softmax loss does not feel the bias: zero up to rounding, and zero we must return.
        errors.append(np.linalg.norm(ours - exact) / (size if size > 1e-13 else 1e-9))
    return errors


def pairs(batch_size, width, *, noise=2.0, seed=0):
    rng = np.random.default_rng(seed)
    image, other = rng.standard_normal((2, batch_size, width))
    text = image + noise * other
    return [
        jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)
        for x in (image, text)
    ]


def make_mesh(shape):
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def with_gradients(kind, **how):
    def loss(*inputs):
        return contrastive_loss(*inputs, kind=kind, **how)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))


def scalars(scale, bias=-5.0):
    return jnp.log(jnp.float32(scale)), jnp.float32(bias)


# ------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_exact_on_every_mesh(kind, shape):
    inputs = *pairs(120, 33), *scalars(100)
    got = with_gradients(kind, mesh=make_mesh(shape), tile=7)(*inputs)
    assert max(relative_errors(got, reference(kind, *inputs))) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_exact_with_one_pair_on_each_device(kind):
    inputs = *pairs(8, 5), *scalars(10)
    got = with_gradients(kind, mesh=make_mesh((4, 2, 1)))(*inputs)
    assert max(relative_errors(got, reference(kind, *inputs))) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_exact_at_a_large_batch_and_scale(kind):
    inputs = *pairs(4096, 48, noise=3.0), *scalars(100)
    true = reference(kind, *inputs)
    for mesh in (None, make_mesh((4, 2, 1))):
        got = with_gradients(kind, mesh=mesh)(*inputs)
        assert max(relative_errors(got, true)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_exact_with_repeated_rows_and_any_norm(kind):
    image, text = pairs(64, 17)
    repeated = image.at[:32].set(image[0]), text.at[16:48].set(text[0])
    lengths = jnp.linspace(0.01, 3.0, 64)[:, None]
    for z_image, z_text in (repeated, (lengths * image, lengths[::-1] * text)):
        inputs = z_image, z_text, *scalars(50)
        got = with_gradients(kind, mesh=make_mesh((4, 1, 1)), tile=8)(*inputs)
        assert max(relative_errors(got, reference(kind, *inputs))) < 1e-5


def test_softmax_of_identical_rows_is_log_b():
    z = jnp.tile(pairs(1, 16)[0], (96, 1))
    scale = 100
    value, gradients = with_gradients("softmax", tile=32)(z, z, *scalars(scale))
    assert float(value) == pytest.approx(math.log(96), rel=1e-6)
    # Positives and negatives pull alike, so every gradient is zero; errors count against the pull
    # of either, which is scale / B on one row and scale, over all rows, on the scale.
    d_image, d_text, d_scale, d_bias = gradients
    assert max(np.linalg.norm(d_image, axis=1)) < 1e-5 * scale / 96
    assert max(np.linalg.norm(d_text, axis=1)) < 1e-5 * scale / 96
    assert abs(d_scale) < 1e-5 * scale
    assert d_bias == 0


@settings(max_examples=10, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    batch_size=st.integers(1, 40),
    width=st.integers(1, 20),
    tile=st.integers(1, 50),
    scale=st.floats(0.1, 100),
    seed=st.integers(0, 2**16),
)
def test_exact_for_any_batch_width_and_tile(kind, batch_size, width, tile, scale, seed):
    inputs = *pairs(batch_size, width, seed=seed), *scalars(scale)
    value, gradients = with_gradients(kind, tile=tile)(*inputs)
    true_value, true_gradients = reference(kind, *inputs)
    # Drawn at will, a loss or gradient may be tiny or cancel: errors count against its terms' size.
    assert float(value) == pytest.approx(true_value, rel=1e-5, abs=1e-5)
    for got, true in zip(gradients, true_gradients, strict=True):
        np.testing.assert_allclose(got, true, rtol=1e-4, atol=2e-6 * max(1.0, scale))


def test_a_tiny_softmax_loss_keeps_its_digits():
    # One-hot pairs: every negative logit is 0 and every positive 20, exactly.
    z = jnp.eye(64, dtype=jnp.float32)
    value, (d_image, *_) = with_gradients("softmax", tile=16)(z, z, *scalars(20))
    off = 63 * math.exp(-20)
    assert float(value) == pytest.approx(math.log1p(off), rel=1e-5)
    assert float(d_image[0, 0]) == pytest.approx(-20 / 64 * off / (1 + off), rel=1e-5)
    assert float(d_image[0, 1]) == pytest.approx(20 / 64 * math.exp(-20) / (1 + off), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_losses_are_their_definitions(kind):
    inputs = *pairs(48, 12), *scalars(30)
    got = jax.value_and_grad(PLAIN[kind], argnums=(0, 1, 2, 3))(*inputs)
    assert max(relative_errors(got[0], reference(kind, *inputs)[0])) < 1e-6
    errors = relative_errors(got[1][:3], reference(kind, *inputs)[1][:3])
    assert max(errors) < 1e-5


# ------------------------------------------------------------------------ the contract


@pytest.mark.parametrize("kind", KINDS)
def test_value_alone_and_value_with_gradients_agree(kind):
    inputs = *pairs(64, 16), *scalars(20)
    mesh = make_mesh((2, 2, 2))
    alone = contrastive_loss(*inputs, kind=kind, mesh=mesh, tile=5)
    both, _ = with_gradients(kind, mesh=mesh, tile=5)(*inputs)
    assert float(alone) == pytest.approx(float(both), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_follow_the_chain_rule(kind):
    image, text = pairs(16, 8)

    def outer(image, text, scale):
        return 3 * contrastive_loss(2 * image, text, scale, kind=kind) ** 2

    def outer_plain(image, text, scale):
        return 3 * PLAIN[kind](2 * image, text, scale) ** 2

    arguments = image, text, jnp.float32(1.0)
    got = jax.grad(outer, argnums=(0, 1, 2))(*arguments)
    true = jax.grad(outer_plain, argnums=(0, 1, 2))(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, true)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_embeddings_sum_in_float32(kind):
    image, text = (z.astype(jnp.bfloat16) for z in pairs(256, 64))
    value, gradients = with_gradients(kind, tile=64)(image, text, *scalars(20))
    true_value, true_gradients = reference(kind, image, text, *scalars(20))
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 2 + [jnp.float32] * 2
    assert float(value) == pytest.approx(true_value, rel=1e-5)  # products of bfloat16 are exact
    errors = relative_errors(gradients[:2], true_gradients[:2])
    assert max(errors) < 2**-8  # a bfloat16 has 8 bits


def test_the_mesh_keeps_the_gradients_sharded_and_gathers_nothing():
    mesh = make_mesh((4, 2, 1))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    inputs = *(jax.device_put(z, rows) for z in pairs(64, 8)), *scalars(10)
    for kind in KINDS:
        compiled = with_gradients(kind, mesh=mesh).lower(*inputs).compile()
        text = compiled.as_text()
        assert "collective-permute" in text
        assert "all-gather" not in text
        _, (d_image, d_text, *_) = compiled(*inputs)
        assert d_image.sharding.is_equivalent_to(rows, 2)
        assert d_text.sharding.is_equivalent_to(rows, 2)


# -------------------------------------------------------------------------- the memory


def temporary_bytes(kind, batch_size, devices):
    mesh = make_mesh((devices, 1, 1))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    z = jax.ShapeDtypeStruct((batch_size, 512), jnp.float32, sharding=rows)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    compiled = with_gradients(kind, mesh=mesh).lower(z, z, number, number).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_linear_in_the_batch(kind):
    at_8k, at_16k, at_32k = (temporary_bytes(kind, b, 1) for b in (8192, 16_384, 32_768))
    assert at_16k < 128e6
    assert at_32k - at_16k == pytest.approx(2 * (at_16k - at_8k), rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_a_large_batch_on_eight_devices(kind):
    assert temporary_bytes(kind, 32_768, 8) < 0.18e9


# --------------------------------------------------------------------------- bad input


@pytest.mark.untyped
def test_bad_input_is_named():
    image, text = pairs(12, 4)
    numbers = scalars(10)
    with pytest.raises(ConfigError, match="no 'triplet' loss"):
        contrastive_loss(image, text, *numbers, kind="triplet")
    with pytest.raises(ConfigError, match=r"z_image \(12, 4\) and z_text \(11, 4\)"):
        contrastive_loss(image, text[1:], *numbers, kind="softmax")
    with pytest.raises(ConfigError, match=r"z_image \(12, 4\) and z_text \(12, 3\)"):
        contrastive_loss(image, text[:, 1:], *numbers, kind="softmax")
    with pytest.raises(ConfigError, match="must both be"):
        contrastive_loss(image[0], text[0], *numbers, kind="softmax")
    with pytest.raises(ConfigError, match="at least one pair"):
        contrastive_loss(image[:0], text[:0], *numbers, kind="softmax")
    for tile in (0, -3):
        with pytest.raises(ConfigError, match=f"tile is {tile}"):
            contrastive_loss(image, text, *numbers, kind="sigmoid", tile=tile)
    with pytest.raises(ShardingError, match="a batch of 12 does not divide over the 8 devices"):
        contrastive_loss(image, text, *numbers, kind="softmax", mesh=make_mesh((4, 2, 1)))
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    with pytest.raises(ShardingError, match=r"none of batch_axes \('data', 'fsdp'\)"):
        contrastive_loss(image, text, *numbers, kind="softmax", mesh=mesh)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 5])
def test_pairs_of_one_group_are_no_negatives(kind, classes):
    """On a mesh, in tiles that do not divide the batch, and where no negative is left at all."""
    z_image, z_text = pairs(24, 8)
    groups = np.random.default_rng(1).integers(0, classes, 24)
    inputs = (z_image, z_text, *scalars(10.0))
    true, exact = reference(kind, *inputs, groups)
    for shape, tile in (((1, 1, 1), None), ((4, 2, 1), 2)):
        how = {"mesh": make_mesh(shape), "groups": jnp.asarray(groups), "tile": tile}
        value, got = with_gradients(kind, **how)(*inputs)
        assert float(value) == pytest.approx(true, rel=2e-6, abs=1e-7)
        assert max(relative_errors(got, exact)) < 1e-5


def test_every_loss_is_listed_with_its_scores():
    assert set(LOSSES) == set(LOSS_SCORES) == set(get_args(Loss))
