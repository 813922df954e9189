"""Resolution schedule: image sizes, and resampled position embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm.errors import ConfigError
from vlm.training.resolution import image_size_at, shrink, with_grid


def test_sizes_follow_their_fractions_of_the_run(tiny):
    experiment = tiny(resolution_schedule=((0.5, 4), (0.25, 8)))
    sizes = [image_size_at(experiment, step, 8) for step in range(8)]
    assert sizes == [4, 4, 4, 4, 8, 8, 16, 16]
    assert image_size_at(tiny(), 0, 8) == 16


def test_a_smooth_field_of_positions_keeps_its_values():
    y, x = jnp.mgrid[0:8, 0:8] / 8 + 1 / 16
    first = jnp.full((1, 2), 7.0)
    table = jnp.concatenate([first, jnp.stack([y, x], -1).reshape(64, 2)])
    small = with_grid({"position": table, "norm": 1}, 4)
    assert small["norm"] == 1
    assert small["position"].shape == (17, 2)
    np.testing.assert_array_equal(small["position"][:1], first)
    y, x = jnp.mgrid[0:4, 0:4] / 4 + 1 / 8
    inner = small["position"][1:].reshape(4, 4, 2)[1:-1, 1:-1]
    np.testing.assert_allclose(inner, jnp.stack([y, x], -1)[1:-1, 1:-1], atol=2e-2)


def test_every_position_gets_a_gradient():
    position = jax.random.normal(jax.random.key(0), (16, 3))
    gradient = jax.grad(lambda p: jnp.square(with_grid({"position": p}, 2)["position"]).sum())
    assert (jnp.abs(gradient(position)).sum(1) > 0).all()


def test_shrinking_averages():
    images = jnp.ones((2, 8, 8, 3)).at[:, :, ::2].set(0)
    np.testing.assert_allclose(shrink(images, 2)[:, :, 0], 0.5, atol=0.1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [(((0.5, 6),), "multiples of patch_size 4"), (((0.7, 8), (0.5, 4)), "add up to at most 1")],
)
def test_invalid_sizes_are_refused(tiny, sizes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(resolution_schedule=sizes)
