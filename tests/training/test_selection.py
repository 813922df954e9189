"""Online selection in a run: the chosen batch, meshes, resuming, counts, and what is refused."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import weights

import vlm
from vlm.config import AugmentConfig, DistillConfig, MeshConfig, SelectionConfig
from vlm.errors import ConfigError
from vlm.losses.joint_selection import ScoredEmbeddings, select_jointly
from vlm.sharding import batch_sharding, make_mesh
from vlm.training.loop import train
from vlm.training.partition import joined
from vlm.training.reinforce import reinforce
from vlm.training.selection import take_rows
from vlm.training.step import Trainer
from vlm.training.teacher import StoredTeacher, Teacher

GOLDEN = Path(__file__).parents[1] / "weights" / "golden"
CLIP = str(GOLDEN / "hf_clip")
SOFTMAX = {"loss": "softmax", "init_bias": None}
HARD = SelectionConfig("hard_learner", filter_ratio=0.5, chunks=2)
JEST = SelectionConfig(reference=CLIP, filter_ratio=0.5, chunks=2)
SMALL = {"batch_size": 8, "vision": {"depth": 1}, "text": {"depth": 1}, "model": SOFTMAX}


def mesh(devices: int, **sizes: int):
    return make_mesh(MeshConfig(**sizes), jax.devices()[:devices])


def super_batch(step: int = 0, size: int = 16) -> dict[str, np.ndarray]:
    random = np.random.default_rng(step)
    return {
        "images": random.integers(0, 256, (size, 16, 16, 3), np.uint8),
        "tokens": random.integers(2, 250, (size, 16)).astype(np.int32),
    }


def with_reference(batch, width: int = 24) -> dict[str, np.ndarray]:
    random = np.random.default_rng(9)
    z = random.normal(size=(2, len(batch["tokens"]), width)).astype(np.float32)
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    return batch | {"teacher_image": z[0], "teacher_text": z[1]}


class Reference(StoredTeacher):
    """Embeddings that a test puts into the batch."""

    own_log_scale, log_scale, logit_bias, width = float(np.log(20.0)), 0.0, None, 24

    def __init__(self):
        pass


def run_steps(experiment, devices: int, count: int = 3, **sizes: int):
    trainer = Trainer(experiment, mesh(devices, **sizes), teacher=Reference())
    state, rows = trainer.init(jnp.int32(20)), []
    for step in range(count):
        state, metrics = trainer.step(state, trainer.place(with_reference(super_batch(step))))
        rows.append({name: float(value) for name, value in metrics.items()})
    return state, rows


# ---------------------------------------------------------------------------- the chosen batch


@pytest.mark.slow
@pytest.mark.parametrize("micro", [None, 4])
def test_a_step_trains_on_the_chosen_pairs(tiny, micro):
    """It is a step of the same run without selection, on the pairs that the scores choose."""
    experiment = tiny(**SMALL, selection=JEST, micro_batch_size=micro)
    trainer = Trainer(experiment, mesh(1), teacher=Reference())
    state, batch = trainer.init(jnp.int32(20)), with_reference(super_batch())
    model = trainer.model(state)
    z_image = model.encode_image(trainer.preprocess.normalize(jnp.asarray(batch["images"])))
    z_text = model.encode_text(jnp.asarray(batch["tokens"]))
    scale = jnp.array(joined(state.params, state.frozen)["logit_scale"])  # the step reuses it
    pairs = jnp.asarray(batch["teacher_image"]), jnp.asarray(batch["teacher_text"])
    models = [
        ScoredEmbeddings(1.0, z_image, z_text, scale),
        ScoredEmbeddings(-1.0, *pairs, jnp.log(20.0)),
    ]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 4)
    rows = select_jointly(key, models, 8, chunks=2, kind="softmax")
    chosen = {name: x[np.asarray(rows)] for name, x in batch.items()}

    after, metrics = trainer.step(state, trainer.place(batch))
    plain = Trainer(dataclasses.replace(experiment, selection=None), mesh(1))
    state = plain.init(jnp.int32(20))
    chosen = {name: chosen[name] for name in ("images", "tokens")}
    expected, loss = plain.step(state, plain.place(chosen))
    np.testing.assert_allclose(metrics["loss"], loss["loss"], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.params, expected.params
    )
    learnability = sum(
        m.weight * vlm.losses.softmax_loss(m.z_image[rows], m.z_text[rows], m.logit_scale)
        for m in models
    )
    np.testing.assert_allclose(metrics["selection/learnability"], learnability, atol=1e-5)
    assert metrics["selection/learnability"] > metrics["selection/learnability_uniform"]
    assert metrics["selection/share"] == 0.5


@pytest.mark.slow
def test_without_a_filter_it_is_plain_training(tiny):
    """A super-batch of one batch: all pairs are chosen, in their order."""
    alone = SelectionConfig(reference=CLIP, filter_ratio=0.0, chunks=2)
    changes = {"text": {"dropout": 0.2, "depth": 1}, "text_masking": 0.3}
    experiment = tiny(**SMALL | changes, selection=alone)
    plain = Trainer(dataclasses.replace(experiment, selection=None), mesh(1))
    trainer = Trainer(experiment, mesh(1), teacher=Reference())
    one, other = trainer.init(jnp.int32(20)), plain.init(jnp.int32(20))
    for step in range(3):
        batch = super_batch(step, 8)
        one, found = trainer.step(one, trainer.place(with_reference(batch)))
        other, expected = plain.step(other, plain.place(batch))
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_eight_devices_train_on_the_same_pairs_as_one(tiny, sizes):
    experiment = tiny(**SMALL, selection=JEST)
    _, alone = run_steps(experiment, 1)
    _, found = run_steps(experiment, 8, **sizes)
    for one, other in zip(alone, found, strict=True):
        for name in ("loss", "selection/learnability", "selection/learnability_uniform"):
            np.testing.assert_allclose(one[name], other[name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("count", [8, 24, 40])
def test_rows_move_between_devices(count):
    random, grid = np.random.default_rng(0), mesh(8)
    tree = {
        "images": random.integers(0, 256, (48, 3, 2), np.uint8),
        "tokens": random.integers(-5, 5, (48, 4)).astype(np.int32),
        "z": random.normal(size=(48, 5)).astype(np.float32),
    }
    rows = np.sort(random.permutation(48)[:count]).astype(np.int32)
    rows[0] = 0
    spread = jax.device_put(tree, batch_sharding(grid))
    moved = jax.jit(lambda tree, rows: take_rows(tree, rows, grid))(spread, rows)
    for name, x in moved.items():
        np.testing.assert_array_equal(x, tree[name][rows])
        assert x.sharding.is_equivalent_to(batch_sharding(grid), x.ndim)
        assert x.dtype == tree[name].dtype


@pytest.mark.slow
def test_no_device_gathers_the_images_of_a_super_batch(tiny):
    """Also no host callback is in the program."""
    experiment = tiny(**SMALL, selection=JEST)
    trainer = Trainer(experiment, mesh(8), teacher=Reference())
    batch = trainer.place(with_reference(super_batch()))
    text = trainer.step.lower(trainer.abstract_state, batch).compile().as_text()
    assert text is not None
    assert "u8[2,16,16,3]" in text  # the shard of a device
    assert "u8[16,16,16,3]" not in text
    assert "callback" not in text


# ----------------------------------------------------------------------------------- references


@pytest.mark.slow
def test_an_online_and_a_stored_reference_choose_the_same_pairs(tiny, learned, tmp_path):
    data = {"augment": AugmentConfig(crop=None)}
    experiment = tiny(
        **SMALL,
        data=data,
        steps=4,
        log_every=1,
        run_dir=str(tmp_path / "online"),
        selection=SelectionConfig(reference=learned, filter_ratio=0.5, chunks=2),
    )
    reinforce(experiment.data, tmp_path / "stored", learned, variants=1)
    stored = SelectionConfig(stored=str(tmp_path / "stored"), filter_ratio=0.5, chunks=2)
    other = dataclasses.replace(experiment, selection=stored, run_dir=str(tmp_path / "read"))
    one, two = train(experiment), train(other)
    for a, b in zip(rows_of(one.folder), rows_of(two.folder), strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)
        name = "selection/learnability"
        np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_teacher_of_a_distillation_is_the_reference(tiny):
    """ACED: the chosen pairs are also distilled."""
    selection = SelectionConfig(filter_ratio=0.5, chunks=2)
    experiment = tiny(**SMALL, selection=selection, distill=DistillConfig(CLIP))
    teacher = Teacher(experiment, mesh(1))
    trainer = Trainer(experiment, mesh(1), teacher=teacher)
    batch = super_batch() | {"teacher_tokens": teacher.tokenizer(["a red bar"] * 16)}
    _, metrics = trainer.step(trainer.init(jnp.int32(9)), trainer.place(batch))
    assert np.isfinite(metrics["loss"])
    assert "selection/learnability" in metrics


# ----------------------------------------------------------------------------------------- runs


def rows_of(run) -> list[dict]:
    lines = (Path(run) / "log.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.slow
def test_a_run_counts_the_examples_that_it_saw_and_trained_on(tiny, tmp_path):
    """Epochs count those that it saw."""
    changes = SMALL | {"steps": None, "epochs": 2.0, "log_every": 2, "selection": HARD}
    result = train(tiny(**changes, run_dir=str(tmp_path / "run")))
    assert result.step == 5  # 2 x 40 examples in super-batches of 16
    last = rows_of(result.folder)[-1]
    assert (last["examples_seen"], last["examples_trained"]) == (80, 40)


@pytest.mark.slow
def test_a_run_resumes_in_the_middle_to_the_same_bits(tiny, tmp_path):
    changes = SMALL | {"steps": 8, "log_every": 2, "checkpoint_every": 0.5, "selection": HARD}
    whole = train(tiny(**changes, run_dir=str(tmp_path / "whole")))
    experiment = tiny(**changes, run_dir=str(tmp_path / "halves"))
    with vlm.steps(experiment) as loop:
        for state, _ in loop:
            if int(state.step) == 4:
                break
    resumed = train(resume=tmp_path / "halves")
    assert weights(tmp_path / "whole") == weights(tmp_path / "halves")
    names = ("loss", "selection/hard_learner", "examples_seen", "examples_trained")
    for one, other in zip(rows_of(whole.folder), rows_of(resumed.folder), strict=True):
        assert [one[name] for name in names] == [other[name] for name in names]


@pytest.mark.slow
def test_a_resumed_run_may_change_its_selection(tiny, tmp_path):
    """The position in the data is kept, and both counts go on."""
    changes = SMALL | {"steps": 4, "log_every": 1, "selection": HARD}
    experiment = tiny(**changes, run_dir=str(tmp_path / "run"))
    with vlm.steps(experiment) as loop:
        for state, _ in loop:
            if int(state.step) == 2:
                break
    plain = dataclasses.replace(experiment, selection=None, steps=3)
    train(plain, resume=tmp_path / "run")
    again = dataclasses.replace(HARD, filter_ratio=0.75)
    result = train(dataclasses.replace(experiment, selection=again), resume=tmp_path / "run")
    last = rows_of(result.folder)[-1]
    # 2 steps of 16, one of 8 that is counted as one of 32, and one of 32.
    assert last["examples_trained"] == 32


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("selection", "changes", "message"),
    [
        ({"filter_ratio": 0.7}, {}, r"0\.7 makes super-batches of 3\.333 batches: choose"),
        ({"filter_ratio": 1.0}, {}, r"SelectionConfig\.filter_ratio is 1"),
        ({"chunks": 3}, {}, r"batch_size 16 is not a multiple of selection\.chunks 3"),
        ({"reference": ""}, {}, r"'learnability' needs a reference: give selection\.reference"),
        ({"stored": "taught"}, {}, "give one of them"),
        ({"score": "hard_learner"}, {}, "'hard_learner' uses no reference"),
        ({"score": "loss"}, {}, "loss"),
        ({}, {"distill": DistillConfig(CLIP)}, "is the teacher of distill, and selection names"),
        ({}, {"objective": "flyp", "data": {"label": "split"}}, "scores pairs by the contrastive"),
    ],
)
def test_an_invalid_selection_is_refused(tiny, selection, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(selection=SelectionConfig(**{"reference": CLIP, "chunks": 2} | selection), **changes)


def test_the_sigmoid_loss_needs_a_reference_with_a_bias(tiny):
    with pytest.raises(ConfigError, match="hf_clip' has none: choose a reference"):
        Teacher(tiny(selection=JEST), mesh(1))
