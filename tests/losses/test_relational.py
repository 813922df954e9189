"""The divergence from a teacher, in tiles around a ring, against whole matrices in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from vlm.errors import ConfigError
from vlm.losses import relational_loss

AXES = ("data", "fsdp", "tensor")


def unit(random, rows: int, width: int) -> np.ndarray:
    x = random.standard_normal((rows, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def inputs(rows: int = 24, width: int = 8, teachers: int = 12, scale: float = 10.0):
    random = np.random.default_rng(0)
    student = unit(random, rows, width), unit(random, rows, width), np.float32(math.log(scale))
    teacher = unit(random, rows, teachers), unit(random, rows, teachers), np.float32(math.log(30))
    return tuple(map(jnp.asarray, (*student, *teacher)))


def mesh(shape) -> Mesh:
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def relational_definition(z_image, z_text, logit_scale, teacher_image, teacher_text, teacher_scale):
    """The loss with whole matrices."""
    logits = jnp.exp(logit_scale) * z_image @ z_text.T
    target = jnp.exp(teacher_scale) * teacher_image @ teacher_text.T
    total = 0.0
    for axis in (1, 0):
        p, log_p = jax.nn.softmax(target, axis), jax.nn.log_softmax(target, axis)
        total += (p * (log_p - jax.nn.log_softmax(logits, axis))).sum() / len(logits)
    return total / 2


@pytest.mark.parametrize(("shape", "tile"), [((1, 1, 1), None), ((1, 1, 1), 7), ((4, 2, 1), 2)])
def test_the_tiles_are_the_definition(shape, tile):
    given = inputs()
    definition = jax.value_and_grad(relational_definition, argnums=(0, 1, 2))
    with jax.enable_x64(True):
        value, gradients = definition(*(jnp.asarray(np.asarray(x, np.float64)) for x in given))

    def loss(*inputs):
        return relational_loss(*inputs, mesh=mesh(shape), tile=tile)

    got, ours = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*given)
    assert float(got) == pytest.approx(float(value), rel=2e-6)
    assert float(jax.jit(loss)(*given)) == pytest.approx(float(value), rel=2e-6)
    for mine, exact in zip(ours, gradients, strict=True):
        size = np.linalg.norm(exact)
        assert np.linalg.norm(np.asarray(mine, np.float64) - exact) < 1e-5 * size


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    z_image, z_text, scale, *_ = inputs()
    same = (z_image, z_text, scale) * 2
    value, gradients = jax.value_and_grad(relational_loss, argnums=(0, 1, 2))(*same)
    assert abs(float(value)) < 1e-6
    assert max(float(jnp.abs(g).max()) for g in gradients) < 1e-6


@pytest.mark.untyped
def test_embeddings_of_other_pairs_are_refused():
    z_image, z_text, scale, *teacher = inputs()
    with pytest.raises(ConfigError, match="a row for each of the student's 23 pairs"):
        relational_loss(z_image[1:], z_text[1:], scale, *teacher)
