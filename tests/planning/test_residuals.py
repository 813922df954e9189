"""Activations of towers without a formula, against what XLA keeps for their gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import own_towers
import pytest
from flax import nnx
from small import experiment

from vlm.config import (
    ConvNeXtConfig,
    EncoderTextConfig,
    ResNetV1Config,
    SwinConfig,
)
from vlm.models.towers import vision_tower
from vlm.nn.transformer import Execution
from vlm.planning import plan
from vlm.planning.residuals import tower_residuals

TOWERS = {
    "convnext": ConvNeXtConfig(32, (2, 2), (32, 64), (128, 256)),
    "resnet": ResNetV1Config(64, (1, 2), stem_width=32),
    "swin": SwinConfig(32, (2, 2), (32, 64), (2, 4), (128, 256), window=4, projection="linear"),
}


def of(vision, **fields):
    e = experiment(64, vision={"image_size": vision.image_size}, dtype="float32", **fields)
    return dataclasses.replace(e, model=dataclasses.replace(e.model, vision=vision))


def compiled_bytes(vision, remat: str) -> float:
    """Bytes of an example that XLA keeps for the gradient of a tower."""
    execution = Execution(remat=remat)
    tower = nnx.eval_shape(lambda: vision_tower(vision, 64, execution=execution, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(tower)

    def loss(state, images):
        return jnp.sum(nnx.merge(graph, state)(images) ** 2)

    def size(rows: int) -> int:
        images = jax.ShapeDtypeStruct((rows, vision.image_size, vision.image_size, 3), jnp.float32)
        step = jax.jit(jax.grad(loss)).lower(state, images).compile()
        return step.memory_analysis().temp_size_in_bytes

    return (size(32) - size(16)) / 16


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("name", TOWERS)
def test_activations_are_those_that_xla_keeps(name, remat):
    found = tower_residuals(of(TOWERS[name], remat=remat), "vision")
    factor = (found.kept + found.layer) / compiled_bytes(TOWERS[name], remat)
    print(f"{name} {remat}: {factor:.2f}")
    assert 0.7 < factor < 2.2


@pytest.mark.parametrize("name", TOWERS)
def test_activations_of_every_tower_are_planned(name):
    """They grow with the batch, and rematerialisation saves some of them where a tower has it."""
    small, large = (
        plan(dataclasses.replace(of(TOWERS[name], remat="none"), batch_size=n), "h100:8").memory
        for n in (64, 128)
    )
    found = tower_residuals(of(TOWERS[name], remat="none"), "vision")
    assert large.activations is not None
    assert small.activations is not None
    assert large.activations - small.activations > 8 * found.kept > 0
    again = tower_residuals(of(TOWERS[name], remat="full"), "vision")
    assert again.kept < found.kept or name == "resnet"
    assert again.saved == found.saved


def test_a_batch_of_a_convnext_that_cannot_fit():
    vision = ConvNeXtConfig(224, projection="linear")
    e = dataclasses.replace(of(vision, remat="none"), dtype="bfloat16", batch_size=8 * 4096)
    made = plan(e, "h100:8")
    assert not made.fits
    assert made.memory.activations is not None
    assert made.memory.activations > 100 * 2**30


def test_text_encoders_and_own_modules_have_activations():
    e = dataclasses.replace(of(own_towers.VISION, remat="none"), batch_size=512)
    own_text = dataclasses.replace(own_towers.TEXT, context_length=16)
    words = (own_text, EncoderTextConfig(512, 16, 64, 2, 2, 32, 128))
    without, own, encoder = (
        plan(dataclasses.replace(e, lock=lock, init_from="model", model=model), "h100:1").memory
        for lock, model in (
            ("text", e.model),
            *(("vision", dataclasses.replace(e.model, text=text)) for text in words),
        )
    )
    images = 512 * 16 * 16 * 3 * 6  # in float32 and in the type of the products
    assert min(m.activations or 0 for m in (without, own, encoder)) > 1.01 * images
