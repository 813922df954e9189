"""How a training step is compiled, by its devices: options of XLA, and loops over blocks."""

import dataclasses
import importlib.util
import platform

import jax
import jax.numpy as jnp
import pytest

from vlm.config import MeshConfig, load_config
from vlm.planning.topology import parse_topology, topology_devices
from vlm.sharding import make_mesh
from vlm.training import compiler_options as options

x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="of x86 CPUs")


def on_a_cpu(dtype=jnp.float32):
    return options.compiler_options(make_mesh(MeshConfig(), jax.devices("cpu")[:1]), dtype)


@x86
def test_float32_products_are_no_fusion_of_ynnpack():
    rows, kernel = jnp.ones((512, 64)), jnp.ones((64, 64))

    def program(**given) -> str:
        return str(jax.jit(jnp.matmul, **given).lower(rows, kernel).compile().as_text())

    assert "__ynn_fusion" in program()
    assert "__ynn_fusion" not in program(compiler_options=on_a_cpu())


def test_other_dtypes_and_abstract_devices_have_no_options():
    assert on_a_cpu(jnp.bfloat16) == {}
    mesh = make_mesh(MeshConfig(), jax.devices("cpu")[:1]).abstract_mesh
    assert options.compiler_options(mesh, jnp.float32) == {}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_gathers_on_tpus_overlap_unless_the_environment_says_otherwise(monkeypatch):
    mesh = make_mesh(MeshConfig(), topology_devices(parse_topology("v5p:2x2x1")))
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    gather, fuse = options.OVERLAPPED_GATHERS
    assert set(options.compiler_options(mesh, jnp.bfloat16)) == {gather, fuse}
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{gather}=false")
    assert set(options.compiler_options(mesh, jnp.bfloat16)) == {fuse}


def test_an_option_that_xla_does_not_have_is_left_out(monkeypatch):
    monkeypatch.setattr(options, "PRODUCTS_BY_EIGEN", {"xla_cpu_no_such_option": "1"})
    assert on_a_cpu() == {}


@x86
def test_flags_of_the_environment_take_precedence(monkeypatch):
    assert set(on_a_cpu()) == set(options.PRODUCTS_BY_EIGEN)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=")
    assert on_a_cpu() == {}


def test_blocks_are_unrolled_on_tpus_unless_they_are_many_or_the_config_says_otherwise():
    e = load_config("siglip_b16")
    vision = dataclasses.replace(e.model.vision, depth=48)
    deep = dataclasses.replace(e, model=dataclasses.replace(e.model, vision=vision))
    chosen = [options.scans_blocks(x, name) for name in ("cpu", "gpu", "tpu") for x in (e, deep)]
    assert chosen == [True, True, True, True, False, True]
    for given in (True, False):
        own = dataclasses.replace(e, scan=given)
        assert [options.scans_blocks(own, name) for name in ("cpu", "tpu")] == [given, given]
