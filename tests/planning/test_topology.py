"""Names of slices and meshes: what is known is understood, what is not is named."""

import importlib.util
import os

import pytest
from small import experiment

from vlm.chips import CHIPS, chip_of
from vlm.errors import ConfigError, ShardingError
from vlm.planning import plan
from vlm.planning.topology import local_topology, parse_mesh, parse_topology, topology_devices


@pytest.mark.parametrize(
    ("name", "chips", "devices"),
    [
        ("v5e:16x16", 256, 256),
        ("v5p:8x8x8", 512, 512),
        ("v4:2x2x1", 4, 4),
        ("V6E:1x1", 1, 1),
        ("tpu7x:4x4x4", 64, 128),
        ("v5p:4x4x12", 192, 192),
        ("2xv5e:16x16", 512, 512),
        ("3xtpu7x:2x2x1", 12, 24),
        ("h100:8", 8, 8),
        ("cpu:8", 8, 8),
    ],
)
def test_a_slice_by_its_name(name, chips, devices):
    topology = parse_topology(name)
    assert (topology.chips, topology.device_count) == (chips, devices)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5x:4x4", r"'v5x:4x4' has an unknown chip.*v5e:\{1x1"),
        ("v5", "has an unknown chip"),
        ("h10:8", "did you mean h100"),
        ("v5e", "needs a shape after the colon"),
        ("v5e:", "needs a shape"),
        ("v5e:4x-4", "needs a shape"),
        ("v5e:0x4", "needs a shape"),
        ("v5e:3x3", "no v5e slice of shape 3x3: choose one of v5e"),
        ("v5p:16x16", "no v5p slice"),
        ("v5p:64x64x64", "up to 6144 chips"),
        ("h100:2x4", "no h100 slice"),
        ("2xh100:8", "only TPUs have slices, so give the number of devices: h100:16"),
        ("2xcpu:4", "give the number of devices: cpu:8"),
        ("0xv5e:4x4", "has 0 slices: choose 1 to 256"),
        ("999xv5e:4x4", "has 999 slices"),
        ("2xv5x:4x4", "has an unknown chip"),
        ("2xv5e:3x3", "no v5e slice of shape 3x3"),
        ("cpu:9999", "asks for 9999 CPU devices and JAX has"),
    ],
)
def test_a_slice_that_is_not(name, message):
    with pytest.raises(ConfigError, match=message):
        parse_topology(name)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("data=32,fsdp=8", (32, 8, 1)),
        ("32x8", (32, 8, 1)),
        ("4x2x2", (4, 2, 2)),
        ("fsdp=8", (-1, 8, 1)),
        ("data=-1, tensor=2", (-1, None, 2)),
    ],
)
def test_a_mesh_by_its_sizes(text, sizes):
    mesh = parse_mesh(text)
    assert (mesh.data, mesh.fsdp, mesh.tensor) == sizes


@pytest.mark.parametrize("text", ["model=4", "data", "data=x", "", "4x", "2x2x2x2"])
def test_a_mesh_that_is_not(text):
    with pytest.raises(ConfigError, match="is not understood"):
        parse_mesh(text)


@pytest.mark.parametrize("topology", ["h100:8", "cpu:8"])
def test_a_mesh_that_does_not_fit_the_slice(topology):
    with pytest.raises(ShardingError, match=f"topology {topology}: mesh .*8"):
        plan(experiment(), topology, "data=3")


def test_slices_that_a_mesh_would_cut_parameters_over():
    with pytest.raises(ShardingError, match=r"topology 2xv5e:4x4: .*make data a multiple of 2"):
        plan(experiment(), "2xv5e:4x4", "data=1,fsdp=32", compiled=False)


def test_a_batch_that_does_not_divide():
    with pytest.raises(ShardingError, match="batch_size 60 does not divide"):
        plan(experiment(batch_size=60), "h100:8")


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "vlm-jax\[tpu\]"'):
        topology_devices(parse_topology("v5e:2x2"))


def test_a_model_that_fits_at_no_batch():
    huge = experiment(text={"vocab_size": 2**24, "width": 4096, "heads": 32})
    with pytest.raises(ConfigError, match=r"take .* GiB of each device .*--mesh fsdp="):
        plan(huge, "h100:64")


def test_a_locked_tower_is_planned_wherever_it_comes_from():
    e = experiment(512, lock="vision", init_from="model")
    assert plan(e, "h100:8").mfu.high < plan(experiment(512), "h100:8").mfu.high


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v3", "v3"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("cpu", None),
    ],
)
def test_the_chip_behind_a_device(kind, name):
    assert chip_of(kind) == CHIPS.get(name)


@pytest.mark.parametrize(
    ("chip", "gib"), [("v3", 15.48), ("v4", 30.75), ("v5e", 15.75), ("v5p", 95.74), ("v6e", 31.25)]
)
def test_a_program_may_use_what_the_compiler_lets_it_have(chip, gib):
    assert CHIPS[chip].usable == pytest.approx(gib * 2**30)


def test_jax_takes_three_quarters_of_a_gpu_or_what_it_is_told(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert CHIPS["h100"].usable == 0.75 * 80e9
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    assert CHIPS["h100"].usable == 0.95 * 80e9


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="extra `tpu`")
@pytest.mark.parametrize("name", ["v3:4x4", "v5e:2x4", "v4:2x2x2", "tpu7x:2x2x1", "2xv6e:2x2"])
def test_the_slice_that_devices_form(name):
    topology = parse_topology(name)
    found = local_topology(topology_devices(topology))
    assert (found.name, found.chips, found.slices) == (name, topology.chips, topology.slices)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="extra `tpu`")
def test_describing_a_slice_leaves_the_environment_as_it_is(monkeypatch):
    names = ("TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE", "ALLOW_MULTIPLE_LIBTPU_LOAD")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "true")
    topology_devices(parse_topology("v5e:2x2"))
    assert [name for name in names if name in os.environ] == []
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "true"
