"""The mesh and its rules: what divides is cut, what does not is refused with the mend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vlm.config import MeshConfig
from vlm.errors import ShardingError
from vlm.sharding import (
    batch_sharding,
    batch_share,
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
    ("sizes", "said"),
    [
        ((16, 1, 1), r"mesh data 16 x fsdp 1 x tensor 1 .* there are 8"),
        ((3, -1, 1), r"there are 8: change the mesh"),
        ((-1, -1, 1), r"at most one is -1"),
        ((0, 1, 8), r"sizes are positive"),
        ((-1, 16, 1), r"there are 8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, said):
    with pytest.raises(ShardingError, match=said):
        make_mesh(MeshConfig(*sizes))


def test_a_batch_that_does_not_divide_is_told_the_nearest_that_do():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    check_batch(24, mesh)
    with pytest.raises(ShardingError, match=r"batch_size 20 .* 8 devices .* choose 16 or 24"):
        check_batch(20, mesh)
    with pytest.raises(ShardingError, match=r"choose 8$"):
        check_batch(5, mesh)


def test_parameters_lie_by_name_and_by_their_largest_dimension():
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
        # Three heads do not divide over two devices: they stay whole, the width does not.
        ((*blocks, "attention", "query", "kernel"), (12, 192, 3, 64)): P(None, "fsdp", None, None),
    }
    for (path, shape), spec in cases.items():
        assert parameter_spec(path, shape, mesh) == spec, (path, shape)


def test_optimizer_moments_lie_where_their_parameter_does():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    kernel = {"mlp": {"up": {"kernel": jnp.zeros((128, 256))}}}
    tree = shardings({"params": kernel, "state": ({"mu": kernel},)}, mesh)
    specs = {s.spec for s in jax.tree.leaves(tree)}
    assert specs == {P("fsdp", "tensor")}


def test_a_batch_becomes_global_and_keeps_its_order():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    assert batch_share(mesh) == (0, 1)
    rows = np.arange(48).reshape(16, 3)
    batch = global_batch({"rows": rows}, mesh)["rows"]
    assert batch.sharding == batch_sharding(mesh)
    assert batch.addressable_shards[0].data.shape == (2, 3)
    np.testing.assert_array_equal(batch, rows)


def test_the_placement_table_counts_bytes_on_one_device():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    tree = {"text": {"mlp": {"kernel": jnp.zeros((128, 128)), "bias": jnp.zeros(128)}}}
    tree = jax.device_put(tree, shardings(tree, mesh))
    assert placement_rows(tree) == [("text/mlp", "fsdp, whole", BIG + 128, 4 * (BIG // 8 + 128))]
    assert placement_rows(tree, 0) == [("", "fsdp, whole", BIG + 128, 4 * (BIG // 8 + 128))]
