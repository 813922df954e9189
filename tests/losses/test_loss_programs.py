"""The losses in a user's own program: meshes with Explicit axes, and `jax.shard_map`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vlm.errors import ShardingError
from vlm.losses import (
    cached_value_and_grad,
    contrastive_loss,
    relational_loss,
    sigmoid_loss,
    softmax_loss,
)
from vlm.losses.cached import split_batch

B, WIDTH = 24, 8
ROWS = P(("data", "fsdp"))
PLAIN = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}
KEYS = jax.random.split(jax.random.key(0), 4)
Z = [z / jnp.linalg.norm(z, axis=1, keepdims=True)
     for z in (jax.random.normal(key, (B, WIDTH)) for key in KEYS)]  # fmt: skip
SCALE, BIAS = jnp.log(10.0), jnp.float32(-10)


def explicit(shape=(2, 2, 2)):
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"))


def close(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def on(mesh, *arrays):
    return [jax.device_put(x, NamedSharding(mesh, ROWS if x.ndim else P())) for x in arrays]


def value_and_grads(loss):
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kind", PLAIN)
def test_a_loss_on_explicit_axes_is_the_loss(kind, named):
    mesh, groups = explicit(), jnp.arange(B) // 2
    wanted = value_and_grads(lambda *z: contrastive_loss(*z, kind=kind, groups=groups))(
        *Z[:2], SCALE, BIAS
    )

    def loss(*z):
        chosen = mesh if named else None
        return contrastive_loss(*z, kind=kind, groups=on(mesh, groups)[0], mesh=chosen, tile=2)

    with jax.set_mesh(mesh):
        value, gradients = value_and_grads(loss)(*on(mesh, *Z[:2], SCALE, BIAS))
    close((value, gradients), wanted)
    assert gradients[0].sharding.spec == P(("data", "fsdp"), None)


def test_the_ring_runs_over_the_axes_of_the_rows():
    """Without `mesh`, on a mesh of other names, and without gathering the embeddings."""
    mesh = jax.make_mesh((8,), ("batch",))
    z = [jax.device_put(x, NamedSharding(mesh, P("batch"))) for x in Z[:2]]
    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(lambda *z: contrastive_loss(*z, SCALE, kind="softmax")))
        text = program.lower(*z).compile().as_text()
    assert "collective-permute" in text
    assert "all-gather" not in text


@pytest.mark.parametrize("kind", PLAIN)
def test_the_plain_losses_on_explicit_axes(kind):
    mesh, loss = explicit(), PLAIN[kind]
    wanted = value_and_grads(loss)(*Z[:2], SCALE, BIAS)
    with jax.set_mesh(mesh):
        close(value_and_grads(loss)(*on(mesh, *Z[:2], SCALE, BIAS)), wanted)


def test_the_relational_loss_on_explicit_axes():
    mesh = explicit()

    def loss(*z):
        return relational_loss(*z, SCALE, *teacher, SCALE)

    teacher = Z[2:]
    wanted = jax.value_and_grad(loss, argnums=(0, 1))(*Z[:2])
    teacher = on(mesh, *teacher)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*on(mesh, *Z[:2]))
    close(found, wanted)


@pytest.mark.parametrize("kind", PLAIN)
def test_cached_gradients_on_explicit_axes(kind):
    mesh = explicit()

    def embed(params, batch, key):
        return batch["image"] @ params, batch["text"]

    def loss(params, z_image, z_text):
        return contrastive_loss(z_image, z_text, SCALE, BIAS, kind=kind)

    params, batch = jnp.eye(WIDTH), {"image": Z[0], "text": Z[1]}
    wanted = jax.value_and_grad(lambda p: loss(p, *embed(p, batch, None)))(params)
    keys = jax.random.split(jax.random.key(1), 3)
    stacked = NamedSharding(mesh, P(None, *ROWS))
    with jax.set_mesh(mesh):
        micro = jax.device_put(split_batch(batch, 3), stacked)
        found = jax.jit(cached_value_and_grad(embed, loss))(params, micro, keys)
    close(found, wanted)


@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("kind", PLAIN)
def test_a_loss_in_a_shard_map_is_that_of_the_global_batch(kind, types):
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(types,) * 2)
    weights = jnp.eye(WIDTH)

    def loss(weights, scale, bias, x, y, mesh=None):
        return contrastive_loss(x @ weights, y, scale, bias, kind=kind, mesh=mesh)

    def local(weights, scale, bias, x, y):
        return jax.value_and_grad(loss, argnums=(0, 1, 2))(weights, scale, bias, x, y, mesh)

    wanted = jax.value_and_grad(loss, argnums=(0, 1, 2))(weights, SCALE, BIAS, *Z[:2])
    with jax.set_mesh(mesh):
        program = jax.shard_map(local, in_specs=(P(), P(), P(), ROWS, ROWS), out_specs=P())
        numbers = [jax.device_put(x, NamedSharding(mesh, P())) for x in (weights, SCALE, BIAS)]
        close(jax.jit(program)(*numbers, *on(mesh, *Z[:2])), wanted)


def test_a_loss_in_a_shard_map_needs_its_rows_sharded():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def compiled(rows, **options):
        def local(*z):
            return contrastive_loss(*z, SCALE, kind="softmax", mesh=mesh)

        return jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=P(), **options)(*Z[:2])

    with pytest.raises(ShardingError, match=r"its rows vary over \['data'\]: shard them over all"):
        compiled(P("data"))
    with pytest.raises(ShardingError, match="with check_vma=True"):
        compiled(ROWS, check_vma=False)
