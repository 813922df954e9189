"""Towers that are a user's own nnx module: what they are given, checks, sharding, FLOPs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import own_towers
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from own_towers import MODEL, TEXT, ConvNet, Lstm

from vlm import sharding
from vlm.config import (
    AdapterConfig,
    Experiment,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PreprocessConfig,
    TextConfig,
    VisionModuleConfig,
    ViTConfig,
    from_dict,
    to_dict,
)
from vlm.errors import ConfigError, ShardingError
from vlm.models import adapters
from vlm.models.dual_encoder import DualEncoder
from vlm.models.flops import encode_flops
from vlm.models.modules import constants, count_flops
from vlm.nn.intermediates import Intermediates
from vlm.nn.transformer import Execution
from vlm.weights.instantiate import abstract_model
from vlm.weights.rules import flat_shapes

SMALL = ViTConfig(
    image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_dim=16, projection="linear"
)
PIXELS = jnp.linspace(-1, 1, 2 * 16 * 16 * 3).reshape(2, 16, 16, 3)


def vision(module, **fields):
    return ModelConfig(VisionModuleConfig(module, image_size=16, **fields), TEXT, embed_dim=16)


def encoder(config=MODEL):
    return DualEncoder(config, rngs=nnx.Rngs(0))


@pytest.mark.untyped
def test_the_config_is_json_with_import_paths():
    values = json.loads(json.dumps(to_dict(MODEL)))
    assert values["vision"]["module"] == "own_towers:ConvNet"
    assert values["vision"]["options"] == [["widths", [8, 16]]]
    again = from_dict(ModelConfig, values)
    assert (again, hash(again)) == (MODEL, hash(MODEL))
    assert isinstance(again.vision, VisionModuleConfig)
    assert again.vision.module.load() is ConvNet
    values["text"] = {"width": 16, "heads": 2, "projection": "linear"}  # as older versions wrote it
    assert from_dict(ModelConfig, values).text == TextConfig(width=16, heads=2, projection="linear")


@pytest.mark.slow
@pytest.mark.untyped
def test_a_model_embeds_by_the_modules():
    model = encoder()
    assert type(model.vision) is ConvNet
    assert type(model.text) is Lstm
    tokens = jnp.ones((2, 12), jnp.int32)
    z_image, z_text = jax.jit(lambda m, x, t: m(x, t))(model, PIXELS, tokens)
    z = np.asarray(model.vision(PIXELS))
    np.testing.assert_allclose(z_image, z / np.linalg.norm(z, axis=1, keepdims=True), atol=1e-6)
    with_dropout = model.encode_text(tokens, keys=jax.random.split(jax.random.key(0), 2))
    assert np.abs(with_dropout - z_text).max() > 0.01  # only the text tower takes keys
    assert constants(model) == {("vision", "scale")}


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        ("own_towers:NoSuch", {}, r"module own_towers has no 'NoSuch'"),
        ("no_such_parts:Tower", {}, r"there is no module 'no_such_parts'"),
        (own_towers.not_a_module, {}, r"no subclass of flax.nnx.Module"),
        (ConvNet, {"depth": 3}, r"constructor of own_towers:ConvNet does not .* options depth"),
        (own_towers.Normed, {}, r"norm/mean, a BatchStat, .*nnx.GroupNorm"),
        (own_towers.Random, {}, r"a generator of random numbers: make layers without one"),
        (own_towers.Counter, {}, r"has count of int32, and a model file holds floating"),
        (own_towers.Broken, {"where": "constructor"}, r"constructor with ValueError: no such back"),
        (own_towers.Broken, {"where": "blocks"}, r"blocks/\w+ of .* one leading axis of layers"),
    ],
)
@pytest.mark.untyped
def test_a_module_that_is_no_tower_is_refused(module, options, words):
    with pytest.raises(ConfigError, match=words):
        abstract_model(vision(module, options=options), jnp.float32)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("shape", r"own_towers:Broken maps \(2, 16, 16, 3\) to \(2, 3\) in float32.* \(2, 16\)"),
        ("nothing", r"to None, and a tower returns embeddings of \(2, 16\)"),
        ("integers", r"returns \(2, 16\) in int32, and embeddings are floating"),
        ("call", r"failed on inputs of \(2, 16, 16, 3\) in float32 with TypeError: dot_general"),
    ],
)
@pytest.mark.untyped
def test_an_output_that_is_no_embedding_is_refused(where, words):
    model = abstract_model(vision(own_towers.Broken, options={"where": where}), jnp.float32)
    with pytest.raises(ConfigError, match=words):
        nnx.eval_shape(lambda m, x: m.encode_image(x), model, PIXELS)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"module": "own_towers:ConvNet(widths=3)"}, r"give its arguments in options"),
        ({"module": 3}, r"give an object, or its import path"),
        ({"options": {"rngs": 3}}, r"'rngs', which vlm passes"),
        ({"options": [("a", 1), ("a", 2)]}, r"has 'a' twice"),
        ({"options": {"a": object()}}, r"options.* has <object .*: give numbers"),
        ({"options": {"a": float("nan")}}, r"options.* is .*nan"),
        ({"partition": {"(": (None,)}}, r"no regular expression"),
        ({"partition": {".*": ("model",)}}, r"is 'model': choose one of 'data', 'fsdp', 'tensor'"),
        ({"partition": {".*": ("fsdp", "fsdp")}}, r"the mesh axis 'fsdp' twice"),
        ({"image_size": 0}, r"image_size is 0"),
    ],
)
@pytest.mark.untyped
def test_a_wrong_config_is_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        VisionModuleConfig(**{"module": ConvNet} | fields)


@pytest.mark.parametrize(
    ("partition", "words"),
    [
        ({"no_such/kernel": (None,)}, r"matches no parameter of own_towers:ConvNet: it has layers"),
        ({"projection/kernel": ("fsdp",)}, r"1 mesh axes, and projection/kernel .*\(16, 16\)"),
    ],
)
@pytest.mark.untyped
def test_partition_rules_fit_the_parameters(partition, words):
    with pytest.raises(ConfigError, match=words):
        abstract_model(vision(ConvNet, partition=partition), jnp.float32)


@pytest.mark.untyped
def test_partition_rules_come_before_the_own_table():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    state = nnx.to_pure_dict(nnx.state(abstract_model(MODEL, jnp.float32)))
    specs = sharding.shardings({"params": state, "mu": state}, mesh, MODEL.partition)
    for tree in (specs["params"], specs["mu"]):
        assert tree["vision"]["layers"][1]["kernel"].spec == P(None, None, None, "tensor")
        assert tree["vision"]["projection"]["kernel"].spec == P("fsdp", None)
        assert tree["text"]["embedding"]["embedding"].spec == P("tensor", None)
        assert tree["text"]["projection"]["kernel"].spec == P(None, None)
    uneven = {"vision": {"projection": {"kernel": jax.ShapeDtypeStruct((15, 16), jnp.float32)}}}
    with pytest.raises(ShardingError, match=r"dimension 0 of projection/kernel, of 15, over the 2"):
        sharding.shardings(uneven, mesh, MODEL.partition)


@pytest.mark.slow
@pytest.mark.untyped
def test_stacks_scan_with_the_execution_that_a_tower_takes():
    config = vision(own_towers.Stacked)
    scanned = DualEncoder(config, execution=Execution(), rngs=nnx.Rngs(0))
    unrolled = DualEncoder(config, execution=Execution(scan=False), rngs=nnx.Rngs(0))
    assert flat_shapes(scanned)["vision.blocks.kernel"] == (3, 16, 16)
    z = np.asarray(scanned.encode_image(PIXELS))
    np.testing.assert_allclose(unrolled.encode_image(PIXELS), z, atol=1e-6)
    low = DualEncoder(config, execution=Execution(dtype=jnp.bfloat16), rngs=nnx.Rngs(0))
    assert 1e-5 < np.abs(low.encode_image(PIXELS) - z).max() < 0.05


@pytest.mark.untyped
def test_flops_are_those_of_the_products():
    image, text = encode_flops(MODEL)
    assert image == 2 * (8 * 8 * 27 * 8 + 4 * 4 * 9 * 8 * 16 + 16 * 16)
    assert text == 2 * (12 * 4 * (16 * 16 + 16 * 16) + 16 * 16)  # a scan over 12 tokens
    stacked, _ = encode_flops(vision(own_towers.Stacked))
    assert stacked == 2 * 16 * (48 * 16 + 3 * 16 * 16) + 2 * 16 * 16

    def branches(x):
        y = jax.lax.cond(x.sum() > 0, lambda x: x @ x @ x, lambda x: x @ x, x)
        return jax.jit(jax.checkpoint(lambda y: y @ y))(y)

    assert count_flops(jax.make_jaxpr(branches)(jnp.ones((4, 4))).jaxpr) == 3 * 2 * 64


@pytest.mark.untyped
def test_what_needs_a_tower_of_vlm_is_refused():
    with pytest.raises(ConfigError, match="captures no intermediate activations"):
        abstract_model(MODEL, jnp.float32).encode_image(PIXELS, intermediates=Intermediates())
    with pytest.raises(ConfigError, match=r"an adapter needs linear layers of vlm\.nn"):
        adapters.prepared(abstract_model(MODEL, jnp.float32), AdapterConfig(rank=2), 0)
    half = dataclasses.replace(MODEL, vision=SMALL)
    names = adapters.targeted(abstract_model(half, jnp.float32), ())
    assert names
    assert all(name.startswith("vision.") for name in names)
    with pytest.raises(ConfigError, match=r"layer_decay 0\.5 needs the order .* the vision tower"):
        Experiment(model=MODEL, optimizer=OptimizerConfig(layer_decay=0.5))
    with pytest.raises(ConfigError, match="resolution_schedule needs a Vision Transformer"):
        Experiment(model=MODEL, resolution_schedule=((0.5, 8),))
    naflex = PreprocessConfig(resize="naflex", image_size=16, patch_size=8, max_patches=4)
    with pytest.raises(ConfigError, match="max_patches"):
        Experiment(model=MODEL, preprocess=naflex)
