"""Distillation: embeddings of the teacher, and the student's losses."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import weights

import vlm
from vlm.config import DataConfig, DistillConfig, Experiment, MeshConfig, OptimizerConfig
from vlm.errors import CheckpointError, ConfigError
from vlm.inputs.tokenizer import TwoTokenizers
from vlm.losses import relational_loss
from vlm.models.dual_encoder import unit_norm
from vlm.sharding import make_mesh
from vlm.training.loop import train
from vlm.training.objectives import Embeddings, objective
from vlm.training.step import Trainer
from vlm.training.teacher import Teacher

GOLDEN = Path(__file__).parents[1] / "weights" / "golden"
TEACHER = str(GOLDEN / "hf_clip")
THIN = {"vision": {"depth": 1}, "text": {"depth": 1}}


def mesh(devices: int):
    return make_mesh(MeshConfig(), jax.devices()[:devices])


def pairs(teacher: Teacher, step: int = 0, size: int = 16) -> dict[str, np.ndarray]:
    random = np.random.default_rng(step)
    texts = [f"a {random.choice(['red', 'blue', 'green'])} {i % 5}" for i in range(16)]
    return {
        "images": random.integers(0, 256, (16, size, size, 3), np.uint8),
        "tokens": random.integers(2, 250, (16, 16)).astype(np.int32),
        "teacher_tokens": teacher.tokenizer(texts),
        "texts": texts,
    }


# -------------------------------------------------------------------------------- teacher


@pytest.mark.parametrize("micro", [None, 8])
def test_a_teachers_embeddings_are_those_of_its_own_model(tiny, micro):
    experiment = tiny(distill=DistillConfig(TEACHER), micro_batch_size=micro)
    bundle = vlm.load(TEACHER)
    size = bundle.preprocess.config.image_size
    teacher = Teacher(experiment, mesh(1))
    batch = pairs(teacher, size=size)
    texts = batch.pop("texts")
    got = teacher(jax.tree.map(jnp.asarray, batch))
    assert set(got) == {"images", "tokens", "teacher_image", "teacher_text"}
    alone = bundle.model.encode_image(bundle.preprocess.normalize(jnp.asarray(batch["images"])))
    np.testing.assert_allclose(got["teacher_image"], alone, atol=2e-6)
    np.testing.assert_allclose(got["teacher_text"], bundle.encode_text(texts), atol=2e-6)
    assert teacher.log_scale == pytest.approx(np.log(bundle.logit_scale))


def test_tokens_of_both_are_side_by_side(tiny):
    one, other = vlm.load(TEACHER).tokenizer, vlm.load(GOLDEN / "hf_siglip").tokenizer
    both, texts = TwoTokenizers(one, other), ["a photo of a cat", "dogs"]
    assert both(texts).shape[1] == both.config.context_length
    batch = both.split({"tokens": both(texts)})
    np.testing.assert_array_equal(batch["tokens"], one(texts))
    np.testing.assert_array_equal(batch["teacher_tokens"], other(texts))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher": "gone"}, CheckpointError, "there is no model 'gone'"),
        (
            {"features": 1.0},
            ConfigError,
            r"embeddings of \d+ dimensions and the student of 16: set",
        ),
        ({"teacher": str(GOLDEN / "hf_naflex")}, ConfigError, "images of any aspect"),
    ],
)
def test_an_unsuitable_teacher_is_refused(tiny, changes, error, message):
    config = DistillConfig(**({"teacher": TEACHER} | changes))
    with pytest.raises(error, match=message):
        Teacher(tiny(distill=config), mesh(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relations": -1.0}, r"DistillConfig\.relations is -1"),
        ({"relations": 0.0}, "nothing is learned from the teacher"),
        ({"temperature": 0.0}, r"DistillConfig\.temperature is 0"),
        ({"projection": True}, r"set distill\.features"),
        ({"teacher": ""}, "needs exactly one teacher"),
        ({"stored": "taught"}, "needs exactly one teacher"),
    ],
)
def test_an_invalid_distillation_is_refused(tiny, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(distill=DistillConfig(**({"teacher": TEACHER} | changes)))


# ---------------------------------------------------------------------------------- steps


def losses(experiment: Experiment, devices: int, count: int = 4) -> list[float]:
    teacher = Teacher(experiment, mesh(devices))
    trainer = Trainer(experiment, mesh(devices), teacher=teacher)
    state, found = trainer.init(jnp.int32(20)), []
    for _ in range(count):
        batch = pairs(teacher)
        del batch["texts"]
        state, metrics = trainer.step(state, trainer.place(batch))
        found.append(float(metrics["loss"]))
    return found


def test_one_device_and_eight_and_micro_batches_agree(tiny):
    config = DistillConfig(TEACHER, features=0.5, projection=True, distance="mse")
    experiment = tiny(distill=config, **THIN)
    alone = losses(experiment, 1)
    cut = dataclasses.replace(experiment, micro_batch_size=8)
    np.testing.assert_allclose(losses(cut, 8), alone, rtol=1e-5)
    assert alone[-1] < alone[0]


def test_loss_weights_scale_the_terms(tiny):
    random = np.random.default_rng(0)
    z = [unit_norm(jnp.asarray(random.standard_normal((16, 16)), jnp.float32)) for _ in range(4)]
    batch = {"teacher_image": z[2], "teacher_text": z[3]}
    params = {"logit_scale": jnp.float32(2), "logit_bias": jnp.float32(-3)}

    def loss(**weights) -> float:
        experiment = tiny(distill=DistillConfig(TEACHER, **weights))
        key, embedded = jax.random.key(0), Embeddings(*z[:2])
        return float(objective(experiment, mesh(1), params, batch, embedded, key, 3.0)[0])

    task = loss(task=1.0, relations=1e-9)
    relations = loss(task=0.0, relations=1.0)
    cosine = loss(task=0.0, relations=0.0, features=1.0)
    mse = loss(task=0.0, relations=0.0, features=1.0, distance="mse")
    assert relations == pytest.approx(
        float(relational_loss(*z[:2], jnp.float32(2), *z[2:], jnp.float32(3))), rel=1e-5
    )
    assert mse == pytest.approx(2 * cosine, rel=1e-5)  # of unit norm
    whole = loss(task=0.5, relations=2.0, features=3.0)
    assert whole == pytest.approx(0.5 * task + 2 * relations + 3 * cosine, rel=1e-5)


# ----------------------------------------------------------------------------------- runs


@pytest.mark.slow
def test_a_resumed_fine_tuning_run_ends_the_same(learned, pale, tmp_path):
    """Including initial weights, EMA, projections and head."""
    optimizer = OptimizerConfig(schedule="constant", warmup=0.0, l2_sp=10.0, ema=0.9)
    whole = Experiment(
        init_from=learned,
        data=DataConfig(pale, label="label", templates=("a {}", "the {}"), eval_split=None),
        objective="flyp",
        distill=DistillConfig(learned, features=1.0, projection=True),
        optimizer=optimizer,
        batch_size=16,
        steps=4,
        run_dir=str(tmp_path / "whole"),
    )
    train(whole)
    half = dataclasses.replace(whole, steps=2, run_dir=str(tmp_path / "half"))
    train(half)
    train(dataclasses.replace(half, steps=4), resume=half.run_dir)
    assert weights(tmp_path / "half") == weights(tmp_path / "whole")
