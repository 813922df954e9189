"""The TPU's attention kernel, run by an interpreter, against attention written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding

from vlm.config import MeshConfig
from vlm.nn import tpu_attention
from vlm.nn.attention import (
    Attention,
    _sharded_kernel,
    attend,
    attend_captured,
)
from vlm.nn.cpu_attention import attend_at_once, attend_in_parts
from vlm.nn.positions import alibi, grid_rotation
from vlm.sharding import AXES, batch_sharding, make_mesh, mesh_of

kernel = functools.partial(tpu_attention.attend, interpret=True)


def interpreted(query, key, value, mask, **options):
    """The kernel on arrays with an axis of heads."""
    flat = (x.reshape(*x.shape[:2], -1) for x in (query, key, value))
    return kernel(*flat, mask, heads=query.shape[2], **options).reshape(query.shape)


def arrays(b, n, heads, d, *, masked=False, dtype=jnp.bfloat16):
    """Queries, keys, values, a gradient of the result, and a mask that leaves some keys."""
    rng = np.random.default_rng(0)
    x = [jnp.asarray(rng.standard_normal((b, n, heads, d)), dtype) for _ in range(4)]
    lengths = rng.integers(1, n, (b, 1, 1, 1))
    return *x, jnp.asarray(np.arange(n) < lengths) if masked else None


def with_gradients(function, query, key, value, gradient, mask, **options):
    """The result and the gradients of its three inputs, in float32."""
    result, pull_back = jax.vjp(lambda *x: function(*x, mask, **options), query, key, value)
    return [np.asarray(x, np.float32) for x in (result, *pull_back(gradient.astype(result.dtype)))]


@pytest.mark.parametrize(
    ("shape", "causal", "masked"),
    [
        ((3, 17, 4, 64), False, False),
        ((3, 17, 4, 64), True, True),
        ((2, 77, 3, 64), True, False),  # heads that fill no register pairs
        ((2, 33, 4, 72), False, True),  # So400m's heads
        ((2, 33, 2, 80), True, False),  # ViT-H
        ((2, 33, 4, 88), False, False),  # ViT-g
        ((2, 33, 4, 96), False, True),
        ((2, 33, 4, 104), False, False),  # ViT-bigG
        ((2, 33, 2, 128), False, True),
        ((2, 33, 3, 20), False, True),  # padded to 24
        ((5, 130, 2, 64), False, False),
        ((1, 1030, 2, 64), True, True),  # in blocks of queries
        ((2, 1500, 2, 72), False, True),
    ],
)
def test_the_kernel_and_its_gradients(shape, causal, masked):
    *x, mask = arrays(*shape, masked=masked)
    assert tpu_attention.fits(x[0], x[1], mask)
    exact = with_gradients(
        functools.partial(attend_in_parts, causal=causal),
        *(a.astype(jnp.float32) for a in x),
        mask,
    )
    rounded = with_gradients(functools.partial(attend_in_parts, causal=causal), *x, mask)
    found = with_gradients(interpreted, *x, mask, causal=causal, vmem=2**26)
    for want, plain, got in zip(exact, rounded, found, strict=True):
        # As near as bfloat16 comes: no further from the exact than the written-out form, by much.
        assert np.abs(got - want).max() <= 2 * np.abs(plain - want).max() + 1e-3


def test_blocks_that_the_batch_does_not_fill(monkeypatch):
    """Three examples in blocks of two, and four heads in blocks of two."""
    monkeypatch.setattr(tpu_attention, "BLOCK", 2 * 16 * 128)
    *x, mask = arrays(3, 16, 4, 64, masked=True)
    assert tpu_attention._heads_per_run(4, 64, 16) == 2
    blocks = with_gradients(interpreted, *x, mask)
    monkeypatch.undo()
    for a, b in zip(blocks, with_gradients(interpreted, *x, mask), strict=True):
        np.testing.assert_array_equal(a, b)


def test_heads_that_straddle_registers_are_padded_where_vmem_is_too_small():
    v4, v5p, v5e = (chip * 2**20 for chip in (16, 48, 96))
    assert tpu_attention._unit(16, 72, 256, v4) == 8
    assert tpu_attention._unit(16, 72, 729, v4) == 64
    assert tpu_attention._unit(16, 104, 257, v4) == 64
    assert tpu_attention._unit(16, 104, 257, v5p) == tpu_attention._unit(16, 72, 729, v5p) == 8
    assert tpu_attention._unit(16, 72, 1024, v5e) == 8
    *x, mask = arrays(2, 16, 4, 72, masked=True)
    plain = with_gradients(interpreted, *x, mask)
    for a, b in zip(plain, with_gradients(interpreted, *x, mask, vmem=1), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("d", "causal", "masked"), [(72, False, True), (64, True, False)])
def test_long_sequences_by_flash_attention(d, causal, masked):
    *x, mask = arrays(1, 1030, 2, d, masked=masked)
    assert tpu_attention.fits(x[0], x[1], mask)
    plain = functools.partial(attend_in_parts, causal=causal)
    exact = with_gradients(plain, *(a.astype(jnp.float32) for a in x), mask)
    rounded = with_gradients(plain, *x, mask)
    with pltpu.force_tpu_interpret_mode():
        found = with_gradients(interpreted, *x, mask, causal=causal)
    for want, other, got in zip(exact, rounded, found, strict=True):
        assert np.abs(got - want).max() <= 2 * np.abs(other - want).max() + 1e-3


@pytest.mark.parametrize("causal", [False, True])
def test_queries_without_a_key_are_those_of_the_written_out_form(causal):
    """Of a text of padding alone; with causal attention, also before a text padded on its left."""
    *x, _ = arrays(2, 16, 2, 64)
    mask = jnp.arange(16) >= jnp.array([16, 5])[:, None, None, None]
    found = with_gradients(interpreted, *x, mask, causal=causal)
    wanted = with_gradients(functools.partial(attend_in_parts, causal=causal), *x, mask)
    assert np.all(found[1][0] == 0)
    for want, got in zip(wanted, found, strict=True):
        np.testing.assert_allclose(got, want, atol=0.04)


@pytest.mark.parametrize("tensor", [1, 2])
def test_every_device_takes_its_own_examples_and_heads(tensor, monkeypatch):
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1, tensor=tensor))
    *x, mask = arrays(8, 16, 4, 64, masked=True)
    x, mask = jax.device_put((x, mask), batch_sharding(mesh))
    monkeypatch.setattr(tpu_attention, "attend", kernel)

    @jax.jit
    def run(query, key, value, gradient, mask):
        form = _sharded_kernel(mesh_of(query), query.shape, True, False)
        result, pull_back = jax.vjp(lambda *a: form(*a, mask), query, key, value)
        return result, *pull_back(gradient)

    compiled = run.lower(*x, mask).compile()
    if tensor == 1:
        assert "all-gather" not in compiled.as_text()
    whole = with_gradients(interpreted, *jax.device_get(x), jnp.asarray(jax.device_get(mask)))
    for a, b in zip(run(*x, mask), whole, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=1e-2)


@pytest.mark.parametrize(
    ("query", "key", "mask"),
    [
        (((2, 16, 2, 64), "float32"), ((2, 16, 2, 64), "float32"), None),
        (((2, 1, 2, 64), "bfloat16"), ((2, 16, 2, 64), "bfloat16"), None),  # pooling's one query
        (((2, 2048, 2, 136), "bfloat16"), ((2, 2048, 2, 136), "bfloat16"), None),
        (((2, 16, 2, 64), "bfloat16"), ((2, 16, 2, 64), "bfloat16"), (2, 1, 16, 16)),
        (((2, 16, 2, 64), "bfloat16"), ((2, 16, 2, 64), "bfloat16"), (1, 1, 1, 16)),
    ],
)
def test_what_the_kernel_does_not_take(query, key, mask):
    query, key = (jax.ShapeDtypeStruct(*x) for x in (query, key))
    mask = None if mask is None else jax.ShapeDtypeStruct(mask, bool)
    assert not tpu_attention.fits(query, key, mask)


@pytest.mark.parametrize(("kind", "runs"), [("TPU v3", False), ("TPU v4", True)])
def test_old_tpus_have_no_kernel_for_bfloat16(kind, runs):
    device = AbstractDevice(kind, num_cores=1, platform="tpu")
    axes = (AxisType.Auto,) * len(AXES)
    mesh = AbstractMesh((1, 1, 1), AXES, axis_types=axes, abstract_device=device)
    assert tpu_attention.runs_on(mesh) == runs
    assert tpu_attention.vmem_on(mesh) == 2**24


@pytest.mark.parametrize(("kind", "mib"), [("TPU v5 lite", 96), ("TPU v5", 48), ("TPU v9", 16)])
def test_a_kernel_may_use_most_of_vmem(kind, mib):
    device = AbstractDevice(kind, num_cores=1, platform="tpu")
    axes = (AxisType.Auto,) * len(AXES)
    mesh = AbstractMesh((1, 1, 1), AXES, axis_types=axes, abstract_device=device)
    assert tpu_attention.vmem_on(mesh) == mib * 2**20


def test_a_mesh_is_read_off_the_types_of_arrays():
    mesh = make_mesh(MeshConfig())
    x = jnp.zeros((8, 16, 2, 64))
    found = []
    run = jax.jit(lambda x: found.append(mesh_of(x)))
    run(x)
    run(jax.device_put(x, batch_sharding(mesh)))
    other = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    run(jax.device_put(x, NamedSharding(other, jax.sharding.PartitionSpec("rows"))))
    assert found[0] is None
    assert dict(found[1].shape) == dict(mesh.shape)
    assert found[2] is None


def test_on_this_machine_the_form_of_a_cpu_runs_whatever_else_was_traced():
    mesh = make_mesh(MeshConfig())
    query, key, value, _, mask = arrays(8, 16, 2, 64, masked=True)
    whole = attend_in_parts(query, key, value, mask, causal=False)
    placed = jax.device_put((query, key, value, mask), batch_sharding(mesh))
    np.testing.assert_allclose(
        np.asarray(jax.jit(attend)(*placed), np.float32), np.asarray(whole, np.float32), atol=1e-2
    )


def test_a_keys_bias_has_no_gradient_but_where_keys_turn_or_logits_are_capped():
    """It adds one number to all logits of a query, so its gradient could only be rounding."""
    x = jax.random.normal(jax.random.key(1), (2, 4, 16))

    def largest(rotation, **options):
        attention = Attention(16, 2, dtype=jnp.float32, rngs=nnx.Rngs(0), **options)
        graph, state = nnx.split(attention)
        total = jax.grad(lambda s: (nnx.merge(graph, s)(x, rotation=rotation) ** 3).sum())(state)
        return {
            name: float(jnp.abs(total[name]["bias"][...]).max())
            for name in ("query", "key", "value")
        }

    plain, turned = largest(None), largest(grid_rotation(2, 8, first=0, before=0))
    capped = largest(None, softcap=0.1)
    assert plain["key"] == 0
    assert min(plain["query"], plain["value"], *turned.values(), *capped.values()) > 1e-3


@pytest.mark.parametrize("shape", [(2, 300, 6, 8), (1, 1100, 2, 8)])  # groups of heads; queries
@pytest.mark.parametrize("masked", ["none", "keys", "queries", "causal"])
def test_attention_in_parts_is_attention(shape, masked):
    b, n, _, d = shape
    *x, keys = arrays(*shape, masked=True, dtype=jnp.float32)
    mask = {"keys": keys, "queries": keys | jnp.eye(n, dtype=bool)}.get(masked)
    attention = functools.partial(attend_in_parts, causal=masked == "causal")
    found = with_gradients(attention, *x, mask)
    visible = np.ones((b, 1, n, n), bool) if mask is None else np.broadcast_to(mask, (b, 1, n, n))
    visible = np.tril(visible) if masked == "causal" else visible
    query, key, value = (np.asarray(a, np.float64).transpose(0, 2, 1, 3) for a in x[:3])
    logits = np.where(visible, query @ key.swapaxes(2, 3) * d**-0.5, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    want = (weights / weights.sum(-1, keepdims=True) @ value).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(found[0], want, atol=2e-6)

    def library(query, key, value, mask):
        causal = masked == "causal"
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal)

    for got, plain in zip(found, with_gradients(library, *x, mask), strict=True):
        np.testing.assert_allclose(got, plain, atol=1e-5)


SLOPES = {2: [2**-4, 2**-8], 6: [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]}  # by number of heads


@pytest.mark.parametrize("shape", [(2, 300, 6, 8), (1, 1100, 2, 8)])  # groups of heads; queries
@pytest.mark.parametrize("kind", ["additive", "alibi", "padded alibi", "causal bias", "softcap"])
def test_attention_in_parts_changes_logits(shape, kind):
    b, n, heads, d = shape
    *x, keys = arrays(*shape, masked=True, dtype=jnp.float32)
    options = {"causal": kind == "causal bias", "softcap": 0.5 if kind == "softcap" else None}
    mask, bias = None, np.zeros((1, 1, 1, 1))
    if kind in ("additive", "causal bias"):
        sizes = (b, 1, n, n) if kind == "additive" else (1, heads, 1, n)
        mask = bias = jnp.asarray(np.random.default_rng(1).standard_normal(sizes), jnp.float32)
    elif "alibi" in kind:
        padded = kind == "padded alibi"
        mask = alibi(heads, keys if padded else None)
        distance = np.abs(np.arange(n)[:, None] - np.arange(n))
        bias = -np.asarray(SLOPES[heads])[:, None, None] * distance
        bias = np.where(keys, bias, -np.inf) if padded else bias[None]
    bias = np.where(np.tri(n, dtype=bool), bias, -np.inf) if options["causal"] else bias

    def written_out(query, key, value, _):
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) * d**-0.5
        cap = options["softcap"]
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits + bias), value)

    found = with_gradients(functools.partial(attend_in_parts, **options), *x, mask)
    with jax.enable_x64(True):
        wanted = with_gradients(written_out, *(jnp.asarray(a, jnp.float64) for a in x), None)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 300, 6, 8), (1, 1100, 2, 8)])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_parts_is_as_near_in_bfloat16_as_the_library(shape, causal):
    *x, mask = arrays(*shape, masked=True)

    def library(query, key, value, mask):
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal)

    exact = with_gradients(library, *(a.astype(jnp.float32) for a in x), mask)
    rounded = with_gradients(library, *x, mask)
    found = with_gradients(functools.partial(attend_in_parts, causal=causal), *x, mask)
    for want, plain, got in zip(exact, rounded, found, strict=True):
        assert np.abs(got - want).max() <= 2 * np.abs(plain - want).max() + 1e-3


@pytest.mark.parametrize("kind", ["keys", "alibi", "queries"])
@pytest.mark.parametrize("shape", [(2, 300, 6, 8), (2, 1100, 2, 8)])
def test_attention_in_parts_of_a_row_without_keys_is_finite(shape, kind):
    b, n, heads, _ = shape
    *x, _ = arrays(*shape, dtype=jnp.float32)
    keys = np.ones((b, 1, 1, n), bool)
    keys[0] = False
    queries = np.ones((b, 1, n, n), bool)
    queries[0, :, -1] = False
    keys, queries = jnp.asarray(keys), jnp.asarray(queries)
    masks = {"keys": keys, "alibi": alibi(heads, keys), "queries": queries}
    found = with_gradients(attend_in_parts, *x, masks[kind])
    assert all(np.isfinite(a).all() for a in found)
    np.testing.assert_allclose(found[0][0, -1], np.asarray(x[2])[0].mean(0), atol=1e-5)


@pytest.mark.parametrize("kind", ["causal", "alibi"])
def test_attention_in_parts_makes_no_mask_of_all_queries(kind):
    n, heads = 2048, 12
    x = [jax.ShapeDtypeStruct((2, n, heads, 8), jnp.float32)] * 3
    keys = jax.ShapeDtypeStruct((2, 1, 1, n), jnp.bool)

    def temporary(attention):
        def run(query, key, value, keys):
            mask = alibi(heads, keys) if kind == "alibi" else None
            return attention(query, key, value, mask, causal=kind == "causal")

        return jax.jit(run).lower(*x, keys).compile().memory_analysis().temp_size_in_bytes

    weights = 2 * heads * n * n * 4
    assert temporary(attend_at_once) >= weights
    assert temporary(attend_in_parts) < weights / 16


@pytest.mark.parametrize("kind", ["additive", "alibi", "softcap"])
def test_only_cpus_attend_in_parts(kind):
    n, heads = 1100, 2
    x = [jax.ShapeDtypeStruct((1, n, heads, 8), jnp.float32)] * 3
    masks = {"additive": jnp.zeros((1, 1, 1, n)), "alibi": alibi(heads)}
    softcap = 5.0 if kind == "softcap" else None
    run = functools.partial(attend_captured, mask=masks.get(kind), softcap=softcap)
    for platform, loops in {"cpu": True, "cuda": False, "tpu": False}.items():
        text = jax.jit(run).trace(*x).lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.while" in text) == loops, platform
