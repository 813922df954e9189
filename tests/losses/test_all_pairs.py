"""`all_pairs`: sums over all pairs and their gradients, against the B x B matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm
from vlm.errors import ConfigError, ShardingError
from vlm.losses import all_pairs, contrastive_loss


def inputs(b=24, d=8):
    rng = np.random.default_rng(0)
    z = [rng.standard_normal((b, d)).astype(np.float32) for _ in range(2)]
    z = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in z]
    return jnp.asarray(z[0]), jnp.asarray(z[1]), jnp.asarray(rng.integers(0, 4, b))


def values(images, texts, paired, parameters):
    """Logits, with pairs and other texts of the same class weighted: uses every argument."""
    (x, own), (y, other) = images, texts
    scale, bias = parameters
    logits = jnp.exp(scale) * x @ y.T + bias
    return jnp.where(paired, 2 * logits, jnp.where(own[:, None] == other, 0.5 * logits, logits))


def dense(images, texts, parameters, reduce):
    matrix = values(images, texts, jnp.eye(len(images[0]), dtype=bool), parameters)
    reduction = {"sum": jnp.sum, "logsumexp": jax.nn.logsumexp}[reduce]
    return reduction(matrix, axis=1), reduction(matrix, axis=0)


@pytest.mark.parametrize("reduce", ["sum", "logsumexp"])
@pytest.mark.parametrize(("devices", "tile"), [(1, None), (1, 5), (4, None), (8, 2)])
def test_sums_and_gradients_are_those_of_the_matrix(reduce, devices, tile):
    x, y, classes = inputs()
    mesh = (
        None if devices == 1 else vlm.sharding.make_mesh(vlm.MeshConfig(), jax.devices()[:devices])
    )
    weights = jnp.linspace(-1, 2, len(x))

    def total(sums, floats):
        x, y, parameters = floats
        of_image, of_text = sums((x, classes), (y, classes), parameters)
        return jnp.vdot(weights, of_image) + jnp.vdot(weights[::-1], of_text**2)

    def ring(*args):
        return all_pairs(values, *args, reduce=reduce, mesh=mesh, tile=tile)

    floats = x, y, (jnp.float32(0.7), jnp.float32(-0.3))
    got = jax.jit(jax.value_and_grad(lambda f: total(ring, f)))(floats)
    wanted = jax.value_and_grad(lambda f: total(lambda *a: dense(*a, reduce), f))(floats)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, wanted)


def test_clip_s_loss_from_it_is_contrastive_loss():
    x, y, _ = inputs()
    mesh = vlm.sharding.make_mesh(vlm.MeshConfig())

    def softmax(x, y, log_scale):
        logits = lambda x, y, paired, scale: scale * x @ y.T  # noqa: E731
        scale = jnp.exp(log_scale)
        sums = all_pairs(logits, x, y, scale, reduce="logsumexp", mesh=mesh)
        return (sum(sums) / 2 - scale * jnp.sum(x * y, axis=1)).mean()

    ours = jax.value_and_grad(softmax, argnums=(0, 1, 2))(x, y, jnp.float32(2))
    built_in = jax.value_and_grad(
        lambda x, y, s: contrastive_loss(x, y, s, kind="softmax", mesh=mesh), argnums=(0, 1, 2)
    )(x, y, jnp.float32(2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, built_in)


@pytest.mark.slow
def test_memory_is_linear_in_the_batch():
    def temporary_bytes(b):
        z = jax.ShapeDtypeStruct((b, 16), jnp.float32)

        def loss(x, y):
            sums = all_pairs(lambda x, y, *_: jnp.exp(x @ y.T), x, y, tile=128)
            return sums[0].mean() + sums[1].mean()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(z, z).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) < 6 * temporary_bytes(1024)  # the matrix grows 16 times
    assert temporary_bytes(4096) < 4096 * 4096  # a quarter of one matrix


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": lambda x, y, *_: (x @ y.T).sum(1)}, r"returns \(2,\) for 2 images and 3 texts"),
        ({"texts": jnp.zeros((3, 8))}, r"\(24, 8\), \(3, 8\): all must begin with the batch"),
        ({"parameters": jnp.zeros(3)}, "must be scalars"),
        ({"reduce": "max"}, "reduce"),
        ({"tile": 0}, "tile is 0"),
    ],
)
def test_wrong_inputs_are_one_sentence(arguments, message):
    x, y, _ = inputs()
    good = {"values": lambda x, y, *_: x @ y.T, "images": x, "texts": y}
    with pytest.raises(ConfigError, match=message):
        all_pairs(**(good | arguments))


def test_a_batch_that_does_not_divide_is_refused():
    x, y, _ = inputs(b=12)
    with pytest.raises(ShardingError, match="12 does not divide over the 8 devices"):
        all_pairs(lambda x, y, *_: x @ y.T, x, y, mesh=vlm.sharding.make_mesh(vlm.MeshConfig()))


@pytest.mark.parametrize("reduce", ["sum", "logsumexp"])
def test_on_explicit_axes_it_takes_the_mesh_of_its_arrays(reduce):
    x, y, classes = inputs()
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))

    def total(x, y, classes, sums):
        of_image, of_text = sums((x, classes), (y, classes), (jnp.float32(0.7), jnp.float32(-0.3)))
        return jnp.sum(of_image) + jnp.sum(of_text**2)

    dense_sums = functools.partial(dense, reduce=reduce)
    wanted = jax.value_and_grad(total, argnums=(0, 1))(x, y, classes, dense_sums)
    sharded = jax.device_put((x, y, classes), rows)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(total, argnums=(0, 1)), static_argnums=3)
        got = step(*sharded, functools.partial(all_pairs, values, reduce=reduce))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, wanted)
