"""Accumulation over micro-batches is the whole batch, to the last parameter."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlm.errors import ConfigError
from vlm.losses import cached_value_and_grad, contrastive_loss

K, B, WIDTH, HIDDEN, DIM = 4, 48, 12, 64, 8


def unit(z):
    return z / jnp.linalg.norm(z, axis=-1, keepdims=True)


def tower(weights, x, key):
    x = jnp.tanh(x @ weights["in"])
    keep = jax.random.bernoulli(key, 0.7, x.shape)
    return unit(jnp.where(keep, x / 0.7, 0) @ weights["out"])


def embed(params, batch, key):
    image_key, text_key = jax.random.split(key)
    z_image = tower(params["image"], batch["images"], image_key)
    return z_image, tower(params["text"], batch["texts"], text_key)


def make(hidden=HIDDEN, batch_size=B):
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def weights():
        return {
            "in": jax.random.normal(next(keys), (WIDTH, hidden)) / WIDTH**0.5,
            "out": jax.random.normal(next(keys), (hidden, DIM)) / hidden**0.5,
        }

    params = {
        "image": weights(),
        "text": weights(),
        "scale": jnp.float32(math.log(20)),
        "bias": jnp.float32(-3.0),
    }
    images = jax.random.normal(next(keys), (batch_size, WIDTH))
    texts = images + jax.random.normal(next(keys), (batch_size, WIDTH))
    batch = {"images": images, "texts": texts}
    cut = jax.tree.map(lambda x: x.reshape(K, batch_size // K, WIDTH), batch)
    return params, cut, jax.random.split(jax.random.key(1), K)


def loss_of(kind, mesh=None):
    def loss(params, z_image, z_text):
        numbers = params["scale"], params["bias"]
        return contrastive_loss(z_image, z_text, *numbers, kind=kind, mesh=mesh)

    return loss


def at_once(loss):
    """The same batch and the same masks, differentiated in one piece."""

    def whole(params, micro_batches, keys):
        parts = [
            embed(params, jax.tree.map(lambda x, i=i: x[i], micro_batches), keys[i])
            for i in range(K)
        ]
        return loss(params, *(jnp.concatenate(z) for z in zip(*parts, strict=True)))

    return jax.jit(jax.value_and_grad(whole))


def assert_equal(got, true, tolerance=1e-6):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(true), strict=True):
        assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 0.1)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_micro_batches_equal_the_whole_batch(kind):
    arguments = make()
    got = jax.jit(cached_value_and_grad(embed, loss_of(kind)))(*arguments)
    assert_equal(got, at_once(loss_of(kind))(*arguments))


def test_other_keys_give_another_gradient():
    params, batches, keys = make()
    step = jax.jit(cached_value_and_grad(embed, loss_of("softmax")))
    value, gradients = step(params, batches, keys)
    other_value, other = step(params, batches, keys[::-1])
    assert abs(value - other_value) > 1e-4
    assert np.linalg.norm(gradients["image"]["in"] - other["image"]["in"]) > 1e-4


def test_negatives_come_from_the_whole_batch():
    # Averaging the losses of micro-batches, the usual shortcut, is another loss.
    params, batches, keys = make()
    value, _ = jax.jit(cached_value_and_grad(embed, loss_of("softmax")))(params, batches, keys)

    def loss_of_one(batch_and_key):
        return loss_of("softmax")(params, *embed(params, *batch_and_key))

    parts = jax.jit(lambda *xs: jax.lax.map(loss_of_one, xs))(batches, keys)
    assert float(value) > float(parts.mean()) + 0.1


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_exact_on_a_mesh_without_moving_rows(kind):
    params, batches, keys = make(batch_size=64)
    mesh = Mesh(
        np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2
    )
    rows = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
    sharded = jax.device_put(batches, rows)
    step = jax.jit(cached_value_and_grad(embed, loss_of(kind, mesh)))
    got = step(jax.device_put(params, NamedSharding(mesh, PartitionSpec())), sharded, keys)
    assert_equal(got, at_once(loss_of(kind))(params, batches, keys))
    text = step.lower(params, sharded, keys).compile().as_text()
    assert "all-to-all" not in text
    assert "all-gather" not in text


def test_parameters_shared_by_embedding_and_loss_add_both_gradients():
    def embed_scaled(params, batch, key):
        return params * batch[0], batch[1]

    def loss(params, z_image, z_text):
        return contrastive_loss(z_image, z_text, params, kind="sigmoid")

    batches = tuple(jax.random.normal(jax.random.key(2), (2, 3, 5, 4)))
    batches = tuple(unit(z) for z in batches)
    params, keys = jnp.float32(0.7), jax.random.split(jax.random.key(0), 3)
    _, got = cached_value_and_grad(embed_scaled, loss)(params, batches, keys)
    flat = [z.reshape(-1, 4) for z in batches]
    true = jax.grad(lambda p: loss(p, p * flat[0], flat[1]))(params)
    assert float(got) == pytest.approx(float(true), rel=1e-5)


def test_memory_holds_the_activations_of_one_micro_batch():
    arguments = make(hidden=4096, batch_size=2048)
    cached = jax.jit(cached_value_and_grad(embed, loss_of("softmax")))

    def temporary_bytes(step):
        return step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(cached) < 0.5 * temporary_bytes(at_once(loss_of("softmax")))


def test_unequal_leading_axes_are_named():
    params, batches, keys = make()
    step = cached_value_and_grad(embed, loss_of("softmax"))
    with pytest.raises(ConfigError, match=r"leading axes \[4\] do not match 3 keys"):
        step(params, batches, keys[:3])
    with pytest.raises(ConfigError, match=r"leading axes \[2, 4\]"):
        step(params, batches | {"texts": batches["texts"][:2]}, keys)
