"""Meshes and shardings: dimensions that divide are sharded, invalid sizes are errors with a fix."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vlm import sharding
from vlm.config import MeshConfig
from vlm.errors import ShardingError
from vlm.sharding import (
    batch_shard,
    batch_sharding,
    check_batch,
    global_batch,
    make_mesh,
    parameter_spec,
    placement_rows,
    shardings,
)

BIG = 2**14


def test_one_size_may_be_left_open():
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((16, 1, 1), r"mesh data 16 x fsdp 1 x tensor 1 .* there are 8"),
        ((3, -1, 1), r"there are 8: change the mesh"),
        ((-1, 16, 1), r"there are 8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(ShardingError, match=message):
        make_mesh(MeshConfig(*sizes))


def test_the_error_of_a_batch_that_does_not_divide_names_the_nearest_sizes():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    check_batch(24, mesh)
    with pytest.raises(ShardingError, match=r"batch_size 20 .* 8 devices .* choose 16 or 24"):
        check_batch(20, mesh)
    with pytest.raises(ShardingError, match=r"choose 8$"):
        check_batch(5, mesh)


def test_parameters_are_sharded_by_name_and_by_their_largest_dimension():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    blocks = ("vision", "transformer", "blocks")
    cases = {
        ((*blocks, "attention", "query", "kernel"), (12, 768, 12, 64)): P(
            None, "fsdp", "tensor", None
        ),
        ((*blocks, "attention", "out", "kernel"), (12, 12, 64, 768)): P(
            None, "tensor", None, "fsdp"
        ),
        ((*blocks, "mlp", "up", "kernel"), (12, 768, 3072)): P(None, "fsdp", "tensor"),
        ((*blocks, "mlp", "down", "kernel"), (12, 3072, 768)): P(None, "tensor", "fsdp"),
        ((*blocks, "mlp_norm", "scale"), (12, 768)): P(None, None),
        (("text", "embedding"), (32_000, 768)): P("tensor", "fsdp"),
        (("logit_scale",), ()): P(),
        # Three heads do not divide over two devices: only the width is sharded.
        ((*blocks, "attention", "query", "kernel"), (12, 192, 3, 64)): P(None, "fsdp", None, None),
    }
    for (path, shape), spec in cases.items():
        assert parameter_spec(path, shape, mesh) == spec, (path, shape)


def test_optimizer_moments_are_sharded_like_their_parameter():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    kernel = {"mlp": {"up": {"kernel": jnp.zeros((128, 256))}}}
    tree = shardings({"params": kernel, "state": ({"mu": kernel},)}, mesh)
    specs = {s.spec for s in jax.tree.leaves(tree)}
    assert specs == {P("fsdp", "tensor")}


def test_a_batch_becomes_global_and_keeps_its_order():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    assert batch_shard(mesh) == (0, 1)
    rows = np.arange(48).reshape(16, 3)
    batch = global_batch({"rows": rows}, mesh)["rows"]
    assert batch.sharding == batch_sharding(mesh)
    assert batch.addressable_shards[0].data.shape == (2, 3)
    np.testing.assert_array_equal(batch, rows)


def test_the_old_name_of_batch_shard_warns():
    with pytest.warns(
        DeprecationWarning, match=r"batch_share is renamed to vlm\.sharding\.batch_shard"
    ):
        assert sharding.batch_share is batch_shard


def test_the_placement_table_counts_bytes_on_one_device():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    tree = {"text": {"mlp": {"kernel": jnp.zeros((128, 128)), "bias": jnp.zeros(128)}}}
    tree = jax.device_put(tree, shardings(tree, mesh))
    assert placement_rows(tree) == [
        ("text/mlp", "fsdp, replicated", BIG + 128, 4 * (BIG // 8 + 128))
    ]
    assert placement_rows(tree, 0) == [("", "fsdp, replicated", BIG + 128, 4 * (BIG // 8 + 128))]


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a TPU slice with the attributes that `make_mesh` reads."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"

    @property
    def process_index(self) -> int:
        x, y, _ = self.coords
        return 1000 * self.slice_index + 8 * (y // 2) + x // 2


def torus(size: int, slices: int = 1) -> list[Chip]:
    places = [(x, y, 0) for y in range(size) for x in range(size)]
    return [Chip(s * len(places) + i, p, s) for s in range(slices) for i, p in enumerate(places)]


@pytest.mark.parametrize("tensor", [2, 4, 8, 16])
@pytest.mark.parametrize("fsdp", [1, 2, 8, 16])
def test_meshes_of_any_sizes_place_the_inner_axes_on_neighbours_of_the_torus(fsdp, tensor):
    """As on v6e:16x16: mesh axes may share an axis of the torus (25 of 27 were refused)."""
    mesh = make_mesh(MeshConfig(fsdp=fsdp, tensor=tensor), torus(16))
    assert dict(mesh.shape) == {"data": 256 // fsdp // tensor, "fsdp": fsdp, "tensor": tensor}
    assert len(set(mesh.devices.flat)) == 256
    for group in mesh.devices.reshape(-1, tensor):
        for one, other in itertools.pairwise(group):
            steps = [abs(a - b) for a, b in zip(one.coords, other.coords, strict=True)]
            assert sum(min(s, 16 - s) for s in steps) <= 2


def test_slices_are_joined_along_data():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2), torus(4, slices=2))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 4, "tensor": 2}
    for index, rows in enumerate(mesh.devices):
        assert {chip.slice_index for chip in rows.flat} == {index // 2}


@pytest.mark.parametrize("config", [MeshConfig(1, 32, 1), MeshConfig(1, 4, 8), MeshConfig(-1, 32)])
def test_a_mesh_that_would_shard_parameters_over_slices_is_refused(config):
    message = "2 slices are joined along data: make data a multiple of 2, and fsdp x tensor at most"
    with pytest.raises(ShardingError, match=message):
        make_mesh(config, torus(4, slices=2))
