"""Towers mapped over the shards of a batch, with parameters that are sharded over `fsdp`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from vlm.config import GroupViTConfig, MeshConfig, ModelConfig, TextConfig, ViTConfig
from vlm.models.dual_encoder import DualEncoder
from vlm.nn.fsdp import fsdp_dimensions, gather_parameters, per_batch_shard
from vlm.nn.transformer import Execution, Transformer, gather_layers
from vlm.sharding import batch_sharding, make_mesh, shardings

MESHES = [MeshConfig(), MeshConfig(fsdp=8), MeshConfig(data=4, fsdp=2)]
names = ["data", "fsdp", "both"]


def errors_of_sums(config: MeshConfig) -> tuple[float, float]:
    """Largest errors of a gradient in bfloat16: by XLA's partitioner, and as towers are mapped.

    Against a sum over the devices in float64, relative to the mean size of a gradient.
    """
    mesh, random = make_mesh(config), np.random.default_rng(0)
    params = {"kernel": jnp.asarray(random.normal(size=(512, 32)), jnp.float32)}
    rows = 8 * mesh.size
    x, ct = (jnp.asarray(random.normal(size=(rows, n)), jnp.float32) for n in (512, 32))
    specs = jax.tree.map(lambda s: s.spec, shardings(params, mesh))
    dimensions = fsdp_dimensions(specs)
    assert dimensions == ({("kernel",): 0} if mesh.shape["fsdp"] > 1 else {})

    def tower(params, x):
        return x.astype(jnp.bfloat16) @ params["kernel"].astype(jnp.bfloat16)

    def mapped(params, x):
        return tower(gather_parameters(params, dimensions), x)

    def gradient(apply):
        return jax.jit(jax.grad(lambda p, x, ct: (apply(p, x).astype(jnp.float32) * ct).sum()))

    alone, parts = gradient(tower), [np.split(a, mesh.size) for a in (x, ct)]
    wanted = sum(np.float64(alone(params, *part)["kernel"]) for part in zip(*parts, strict=True))
    placed = [jax.device_put(a, batch_sharding(mesh)) for a in (x, ct)]
    whole = jax.device_put(params, shardings(params, mesh))

    def error(apply):
        got = gradient(apply)(whole, *placed)["kernel"]
        return float(np.abs(got - wanted).max() / np.abs(wanted).mean())

    return error(tower), error(per_batch_shard(mapped, mesh, specs))


@pytest.mark.parametrize("config", MESHES, ids=names)
def test_gradients_in_bfloat16_are_summed_over_devices_in_float32(config):
    partitioned, mapped = errors_of_sums(config)
    assert partitioned > 3e-3
    assert mapped < 1e-6


@pytest.mark.parametrize("config", ["data=256, fsdp=1", "data=16, fsdp=16"])
def test_gradients_in_bfloat16_are_summed_over_256_devices_in_float32(config):
    code = (
        "from test_fsdp import MeshConfig, errors_of_sums\n"
        f"print(*errors_of_sums(MeshConfig({config})))"
    )
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=256", "JAX_PLATFORMS": "cpu"}
    output = subprocess.check_output(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=os.environ | flags, text=True
    )
    partitioned, mapped = map(float, output.split())
    assert partitioned > 1e-2
    assert mapped < 1e-6


@pytest.mark.parametrize("remat", ["none", "dots_no_batch"])
@pytest.mark.parametrize("config", MESHES[1:], ids=names[1:])
def test_layers_gather_their_own_parameters(config, remat, monkeypatch):
    """One layer at a time: the loops over layers gather, and no array has all layers whole."""
    monkeypatch.setattr("vlm.sharding.SMALLEST_SHARDED", 512)
    options = {"act": "gelu", "norm_eps": 1e-6, "execution": Execution(remat=remat)}
    stack = Transformer(128, 3, 4, 256, rngs=nnx.Rngs(0), **options)
    plain, params = nnx.split(stack)
    params, mesh = nnx.to_pure_dict(params), make_mesh(config)
    specs = jax.tree.map(lambda s: s.spec, shardings(params, mesh))
    dimensions = fsdp_dimensions(specs)
    assert gather_layers(stack, dimensions) == set(dimensions)
    assert len(dimensions) == 6  # kernels
    graph = nnx.graphdef(stack)

    x = jax.random.normal(jax.random.key(1), (16, 5, 128))
    towers = per_batch_shard(lambda p, x: nnx.merge(graph, p)(x), mesh, specs)
    weights = jax.random.normal(jax.random.key(2), x.shape)
    compiled: Any = jax.jit(jax.value_and_grad(lambda p, x: (towers(p, x) * weights).sum()))
    placed = (
        jax.device_put(params, shardings(params, mesh)),
        jax.device_put(x, batch_sharding(mesh)),
    )
    value, grads = compiled(*placed)
    wanted, right = jax.value_and_grad(lambda p: (nnx.merge(plain, p)(x) * weights).sum())(params)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads, right)
    text = compiled.lower(*placed).compile().as_text()
    assert "f32[128,256]" in text
    assert "f32[3,128,256]" not in text


def test_every_transformer_of_a_model_is_found():
    """Also in lists of stages; parameters of other modules are left to be gathered at once."""
    text = TextConfig(vocab_size=99, context_length=8, width=32, depth=2, heads=2, mlp_dim=64)
    towers = {
        "vit": ViTConfig(image_size=16, patch_size=8, width=32, depth=2, heads=2, mlp_dim=64),
        "groupvit": GroupViTConfig(),
    }
    for name, vision in towers.items():
        config = ModelConfig(vision=vision, text=text, embed_dim=32)
        model = nnx.eval_shape(lambda config=config: DualEncoder(config, rngs=nnx.Rngs(0)))
        params = nnx.to_pure_dict(nnx.state(model))
        mesh = make_mesh(MeshConfig(fsdp=2))
        dimensions = fsdp_dimensions(jax.tree.map(lambda s: s.spec, shardings(params, mesh)))
        found = gather_layers(model, dimensions)
        in_layers = {p for p in dimensions if "transformer" in p and "blocks" in p}
        assert found == in_layers, name
        assert any(p[0] == "vision" for p in found) or name == "vit"


def test_towers_are_not_mapped_on_one_device_and_with_tensor():
    for mesh in (make_mesh(MeshConfig(), jax.devices()[:1]), make_mesh(MeshConfig(tensor=2))):
        assert per_batch_shard(len, mesh, P()) is len
