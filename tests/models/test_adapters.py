"""Adapters over whole models: they change nothing at first, merge exactly, add up and pad."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quick import AS_USERS

from vlm.bundle import load
from vlm.config import AdapterConfig
from vlm.errors import ConfigError
from vlm.models import adapters
from vlm.nn.lora import column_lengths
from vlm.weights import open_clip, openai
from vlm.weights.instantiate import abstract_model
from vlm.weights.rules import fill
from vlm.weights.torch_pickle import TorchFile

GOLDEN = pathlib.Path(__file__).parent.parent / "weights" / "golden"
# One of each kind of tower, of pool and of MLP, and the tower that is of that kind.
KINDS = {
    "hf_siglip": "vision",
    "hf_chinese_clip": "text",
    "oc_coca": "vision",
    "oc_convnext_mlp": "vision",
    "oc_eva02": "vision",
    "oc_fastvit_large": "vision",
    "oc_vitamin": "vision",
    "openai_resnet": "vision",
}


def opened(name):
    """A small golden model, and its inputs and outputs."""
    if not name.startswith("openai"):
        return load(GOLDEN / name).model, np.load(GOLDEN / name / "outputs.npz")
    tensors = TorchFile(GOLDEN / f"{name}.pt")
    config = openai.model_config(tensors.shapes, name)
    rules = open_clip.rules(config, tensors.shapes)
    model = abstract_model(config, jnp.float32)
    model = fill(model, rules, tensors, dtype=np.float32, ignored=openai.ignored)
    return model, np.load(GOLDEN / f"{name}.npz")


def outputs(model, golden, tower="text"):
    """The embeddings of one tower, of models of one form by one program."""
    graph, state = nnx.split(model)
    inputs = {"vision": "pixels", "text": "tokens"}[tower]
    return np.asarray(embed(graph, state, jnp.asarray(golden[inputs]), tower))


@functools.partial(jax.jit, static_argnums=(0, 3), compiler_options=AS_USERS or None)
def embed(graph, state, inputs, tower):
    model = nnx.merge(graph, state)
    return {"vision": model.encode_image, "text": model.encode_text}[tower](inputs)


def random_factors(adapter, seed=0):
    """The same layers and ranks with factors that all matter."""
    random = np.random.default_rng(seed)

    def drawn(x):
        return jnp.asarray(random.standard_normal(x.shape), jnp.float32)

    return {
        name: adapters.Factors(
            drawn(f.a) * 0.3,
            drawn(f.b) * 0.1,
            f.scale,
            None if f.magnitude is None else f.magnitude * (1 + 0.1 * drawn(f.magnitude)),
        )
        for name, f in adapter.items()
    }


def every_layer(model, **changes):
    layers = adapters.linear_layers(model)
    least = min(min(s.inputs, s.outputs) for s in map(adapters.size_of, layers.values()))
    return AdapterConfig(rank=min(4, least), alpha=4.0, targets=("*",), **changes)


def begins_as_it_was_and_merges(name, tower):
    """The largest difference between a model with an adapter of every layer and the merged one."""
    model, golden = opened(name)
    before = outputs(model, golden, tower)
    adapter = adapters.fresh(model, every_layer(model), jax.random.key(0))
    assert adapter.keys() == adapters.linear_layers(model).keys()
    assert np.array_equal(outputs(adapters.attach(model, adapter), golden, tower), before)

    adapter = random_factors(adapter)
    attached = adapters.attach(model, adapter)
    changed = outputs(attached, golden, tower)
    assert np.abs(changed - before).max() > 1e-3
    off = {n: dataclasses.replace(f, scale=f.scale * 0) for n, f in adapter.items()}
    assert np.array_equal(outputs(adapters.attach(model, off), golden, tower), before)
    assert adapters.adapter_of(adapters.detach(attached)) == {}
    return np.abs(outputs(adapters.merged(attached), golden, tower) - changed).max()


@pytest.mark.parametrize("name", KINDS)
def test_every_linear_layer_begins_as_it_was_and_merges(name):
    assert begins_as_it_was_and_merges(name, KINDS[name]) < 1e-6


@pytest.mark.peers  # of the same kinds again, under other names: too long for the suite
@pytest.mark.parametrize("tower", ["vision", "text"])
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*/outputs.npz")), ids=lambda p: p.parent.name)
def test_every_family_begins_as_it_was_and_merges(path, tower):
    assert begins_as_it_was_and_merges(path.parent.name, tower) < 1e-6


# ------------------------------------------------------------------- a model of two blocks a tower


@pytest.fixture(scope="module")
def small():
    return opened("hf_clip")


def test_projections_of_attention_and_mlps_are_the_default(small):
    names = adapters.targeted(small[0], ())
    blocks = "transformer.blocks"
    assert names == sorted(
        f"{tower}.{blocks}.{layer}"
        for tower in ("vision", "text")
        for layer in (
            *(f"attention.{part}" for part in ("query", "key", "value", "out")),
            "mlp.up",
            "mlp.down",
        )
    )
    assert adapters.targeted(small[0], ("text.*.query", "*.projection")) == [
        "text.projection",
        f"text.{blocks}.attention.query",
        "vision.projection",
    ]


def test_a_resnet_has_its_pool():
    names = adapters.targeted(opened("openai_resnet")[0], ("vision.*",))
    assert names == [f"vision.pool.{part}" for part in ("key", "out", "query", "value")]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"targets": ("text.*", "image.*")},
            r"'image\.\*' matches no linear layer: the model has text\.projection, text\.trans",
        ),
        ({"targets": ("vision.stem",)}, "no linear layer, but vision.stem, which is a PatchStem"),
        ({"rank": 4000}, r"adapter.rank 4000 is larger than text\.\S+, a matrix of \d+ x \d+: ch"),
    ],
)
def test_what_cannot_be_adapted_is_named(small, config, message):
    with pytest.raises(ConfigError, match=message):
        adapters.fresh(small[0], AdapterConfig(**config), jax.random.key(0))


def test_an_adapter_of_another_model_is_refused(small):
    model, _ = small
    config = AdapterConfig(rank=2, targets=("text.*.query",))
    adapter = adapters.fresh(model, config, jax.random.key(0))
    (factors,) = adapter.values()
    with pytest.raises(ConfigError, match=r"is for text\.pool, which the model does not have"):
        adapters.attach(model, {"text.pool": factors})
    with pytest.raises(ConfigError, match=r"of text\.projection has a of .* and the layer takes"):
        adapters.attach(model, {"text.projection": factors})


@pytest.mark.parametrize("fields", [{"rank": -1}, {"alpha": -1.0}, {"alpha": float("nan")}])
def test_sizes_that_cannot_be(fields):
    with pytest.raises(ConfigError, match=rf"AdapterConfig\.{next(iter(fields))} is .*: choose"):
        AdapterConfig(**fields)


def test_rank_zero_is_the_model(small):
    model, golden = small
    adapter = adapters.fresh(model, AdapterConfig(rank=0), jax.random.key(0))
    attached = adapters.attach(model, adapter)
    assert np.array_equal(outputs(attached, golden), outputs(model, golden))
    assert np.array_equal(outputs(adapters.merged(attached), golden), outputs(model, golden))


def test_dora_begins_near_the_model_and_merges(small):
    """A column divided by its own length is rounded once, so the start is not bit-equal."""
    model, golden = small
    before = outputs(model, golden)
    adapter = adapters.fresh(model, every_layer(model, dora=True), jax.random.key(0))
    assert np.abs(outputs(adapters.attach(model, adapter), golden) - before).max() < 1e-6
    adapter = random_factors(adapter)
    attached = adapters.attach(model, adapter)
    changed = outputs(attached, golden)
    assert np.abs(outputs(adapters.merged(attached), golden) - changed).max() < 1e-6
    lengths = column_lengths(
        adapters.matrix(adapters.linear_layers(adapters.merged(attached))["text.projection"])
    )
    assert np.allclose(lengths, np.abs(adapter["text.projection"].magnitude), rtol=1e-5)
    off = {n: dataclasses.replace(f, scale=f.scale * 0) for n, f in adapter.items()}
    assert np.array_equal(outputs(adapters.attach(model, off), golden), before)


def test_a_sum_of_adapters_is_their_sum(small):
    """Of matrices, seen where only one layer is adapted: the whole model is not linear in them."""
    model, _ = small
    name = "vision.transformer.blocks.mlp.up"
    parts = []
    for seed, rank in ((0, 2), (1, 3)):
        config = AdapterConfig(rank=rank, alpha=1.0, targets=(name,))
        adapter = adapters.fresh(model, config, jax.random.key(seed))
        parts.append(random_factors(adapter, seed))
    whole = adapters.stacked(parts, [0.5, -2.0])
    assert whole[name].rank == 5

    def added(adapter):
        merged = adapters.linear_layers(adapters.merged(adapters.attach(model, adapter)))[name]
        return adapters.matrix(merged) - adapters.matrix(adapters.linear_layers(model)[name])

    want = 0.5 * added(parts[0]) - 2.0 * added(parts[1])
    np.testing.assert_allclose(added(whole), want, atol=1e-6)


def test_padded_adapters_have_one_form_and_add_the_same(small):
    model, _ = small
    parts = [
        random_factors(adapters.fresh(model, AdapterConfig(rank=r, targets=t), jax.random.key(r)))
        for r, t in ((2, ("text.*",)), (4, ("*.query",)))
    ]
    same = adapters.padded(parts)
    assert jax.tree.map(jnp.shape, same[0]) == jax.tree.map(jnp.shape, same[1])
    for before, after in zip(parts, same, strict=True):
        one, other = (
            adapters.linear_layers(adapters.merged(adapters.attach(model, part)))
            for part in (before, after)
        )
        for name in one:
            np.testing.assert_allclose(
                adapters.matrix(one[name]), adapters.matrix(other[name]), atol=1e-6
            )


def test_dora_has_no_sum_and_no_switch_with_lora(small):
    both = [
        adapters.fresh(small[0], AdapterConfig(rank=1, dora=dora), jax.random.key(0))
        for dora in (False, True)
    ]
    with pytest.raises(ConfigError, match="is DoRA's, whose lengths of columns have no sum"):
        adapters.stacked(both, [1.0, 1.0])
    with pytest.raises(ConfigError, match="is DoRA's and another is not"):
        adapters.padded(both)


def test_int8_kernels_are_near_and_merge(small):
    model, golden = small
    before = outputs(model, golden)
    whole = adapters.quantized(model)
    kernel = adapters.linear_layers(whole)["text.transformer.blocks.mlp.up"].kernel
    assert kernel.dtype == jnp.int8
    assert kernel.get_value().max() == 127
    near = outputs(whole, golden)
    assert 1e-5 < np.abs(near - before).max() < 0.05
    assert np.abs(outputs(adapters.merged(whole), golden) - near).max() < 1e-6
    adapter = adapters.fresh(whole, AdapterConfig(rank=2, alpha=2.0, dora=True), jax.random.key(0))
    attached = adapters.attach(whole, random_factors(adapter))
    changed = outputs(attached, golden)
    assert np.abs(outputs(adapters.merged(attached), golden) - changed).max() < 1e-6
