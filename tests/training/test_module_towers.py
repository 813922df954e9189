"""Runs with towers of the user's own: on a mesh, resumed, planned, and as the start of others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from own_towers import MODEL, TEXT, WORDS

import vlm
from vlm.config import (
    AdapterConfig,
    DataConfig,
    Experiment,
    MeshConfig,
    OptimizerConfig,
    PreprocessConfig,
    TokenizerConfig,
    ViTConfig,
)
from vlm.errors import ConfigError, ShardingError
from vlm.sharding import global_batch, make_mesh
from vlm.training.loop import train
from vlm.training.step import Trainer

MESH = MeshConfig(data=2, fsdp=2, tensor=2)
EXPERIMENT = Experiment(
    name="own",
    model=MODEL,
    preprocess=PreprocessConfig(image_size=16),
    tokenizer=TokenizerConfig(context_length=12),
    optimizer=OptimizerConfig(ema=0.9, warmup=0.0),
    batch_size=16,
    steps=4,
    log_every=2,
)


def batch(step: int) -> dict:
    random = np.random.default_rng(step)
    images = random.integers(0, 256, (16, 16, 16, 3), np.uint8)
    return {"images": images, "tokens": random.integers(2, 280, (16, 12), np.int32)}


def trained(experiment: Experiment, devices: int):
    mesh = make_mesh(experiment.mesh, jax.devices()[:devices])
    trainer = Trainer(experiment, mesh)
    state, metrics = trainer.init(jnp.int32(4)), {}
    for step in range(2):
        state, metrics = trainer.step(state, global_batch(batch(step), mesh))
    return state, float(metrics["loss"])


@pytest.mark.parametrize("rule", [{"eps": 1e-3}, {"name": "adafactor"}])
@pytest.mark.slow
def test_steps_on_a_mesh_are_those_of_one_device(rule):
    rule = dataclasses.replace(EXPERIMENT.optimizer, **rule)
    e = dataclasses.replace(EXPERIMENT, optimizer=rule)
    alone, loss = trained(e, 1)
    shared, same = trained(dataclasses.replace(e, mesh=MESH), 8)
    assert same == pytest.approx(loss, abs=1e-4)
    for a, b in zip(jax.tree.leaves(alone.params), jax.tree.leaves(shared.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)
    assert shared.params["vision"]["layers"][1]["kernel"].sharding.spec == P(
        None, None, None, "tensor"
    )
    assert shared.ema["text"]["embedding"]["embedding"].sharding.spec == P("tensor", None)
    if rule.name == "adamw":
        moments = shared.opt_state[1].mu["vision"]["projection"]["kernel"]
        assert moments.sharding.spec == P("fsdp", None)
    assert "scale" not in shared.params["vision"]  # a constant
    assert shared.frozen["vision"]["scale"] == 2.0


@pytest.mark.slow
def test_a_tower_gets_parameters_whole_whatever_its_partition_shards():
    text = dataclasses.replace(TEXT, partition=(("embedding/embedding", ("data", "fsdp")),))
    e = dataclasses.replace(EXPERIMENT, model=dataclasses.replace(MODEL, text=text))
    _, loss = trained(e, 1)
    shared, same = trained(dataclasses.replace(e, mesh=MeshConfig(data=4, fsdp=2)), 8)
    assert same == pytest.approx(loss, abs=1e-4)
    spec = shared.params["text"]["embedding"]["embedding"].sharding.spec
    assert spec == P("data", "fsdp")


@pytest.mark.slow
def test_a_run_is_resumed_loaded_and_continued(drawings, tmp_path):
    data = DataConfig(source=drawings, eval_split=None)
    e = dataclasses.replace(EXPERIMENT, data=data, mesh=MESH, run_dir=str(tmp_path / "run"))
    run = train(e)
    before = vlm.load(run).encode_text(WORDS)
    train(None, resume=str(run))
    np.testing.assert_array_equal(vlm.load(run).encode_text(WORDS), before)
    start = Experiment(
        init_from=str(run),
        data=data,
        steps=2,
        batch_size=16,
        lock="text",
        run_dir=str(tmp_path / "next"),
    )
    tuned = vlm.load(train(start))
    assert getattr(tuned.config.vision, "module", None) == "own_towers:ConvNet"
    np.testing.assert_array_equal(tuned.encode_text(WORDS), before)  # locked
    lora = dataclasses.replace(start, lock="none", adapter=AdapterConfig(rank=2))
    with pytest.raises(ConfigError, match=r"an adapter needs linear layers of vlm\.nn"):
        train(dataclasses.replace(lora, run_dir=str(tmp_path / "lora")))
    with pytest.raises(ConfigError, match="image_size 32: a tower of your own takes only 16"):
        train(dataclasses.replace(start, init_image_size=32, run_dir=str(tmp_path / "large")))


@pytest.mark.slow
def test_a_plan_counts_shards_and_products():
    e = dataclasses.replace(EXPERIMENT, mesh=MESH)
    plan = vlm.plan(e, "h100:8", compiled=False)
    assert plan.fits
    assert plan.flops["vision/module"].forward == 16 * vlm.models.flops.encode_flops(MODEL)[0]
    assert plan.flops["text/module"].backward == 2 * plan.flops["text/module"].forward
    whole = dataclasses.replace(EXPERIMENT, mesh=MeshConfig(data=8))
    shared, alone = (vlm.plan(x, "h100:8", compiled=False).memory.parameters for x in (e, whole))
    halved = 280 * 16 + 8 * 27 + 16 * 72 + 16 * 16  # embedding, two kernels, projection
    assert alone - shared == 4 * halved // 2
    vit = ViTConfig(
        image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_dim=16, projection="linear"
    )
    half = dataclasses.replace(e, model=dataclasses.replace(MODEL, vision=vit, text=TEXT))
    assert vlm.plan(half, "h100:8", compiled=False).fits


@pytest.mark.slow
def test_a_compiled_plan_of_virtual_devices():
    plan = vlm.plan(dataclasses.replace(EXPERIMENT, mesh=MESH), "cpu:8")
    assert plan.memory.basis == "compiled"
    assert plan.fits


def test_a_partition_that_does_not_divide_is_refused():
    vision = dataclasses.replace(
        MODEL.vision,
        options=(("widths", (8, 15)),),
        partition=(("projection/kernel", ("fsdp", None)),),
    )
    e = dataclasses.replace(EXPERIMENT, model=dataclasses.replace(MODEL, vision=vision), mesh=MESH)
    with pytest.raises(ShardingError, match="of 15, over the 2 devices of mesh axis fsdp"):
        vlm.plan(e, "h100:8", compiled=False)
    with pytest.raises(ShardingError, match="of 15, over the 2 devices of mesh axis fsdp"):
        Trainer(e, make_mesh(MESH))
