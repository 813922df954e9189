"""Classification and FLYP objectives: the head starts as zero-shot and is saved."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm
from vlm.config import DataConfig, Experiment, MeshConfig
from vlm.errors import CheckpointError, ConfigError, DataError
from vlm.heads.zero_shot import ZeroShotClassifier
from vlm.inputs.tokenizer import train_bpe
from vlm.sharding import global_batch, make_mesh
from vlm.training.loop import train
from vlm.training.step import Trainer
from vlm.training.supervision import Classes

TEMPLATES = ("a {}", "a {} at the top left")
LABELS = {"data": {"label": "label", "templates": TEMPLATES}}


def made(tiny, source, **changes) -> Experiment:
    data = LABELS["data"] | {"source": source, "eval_split": "test"}
    return tiny(data=data, init_from="model", **changes)


@pytest.fixture(scope="module")
def classes(pale):
    tokenizer = train_bpe(["a red bar", "a blue square at the top left"], 300, 16)
    return Classes(DataConfig(pale, **LABELS["data"]), tokenizer)


# ------------------------------------------------------------------------------- classes


def test_a_text_is_of_its_class_in_any_template(classes):
    assert len(classes) == 8
    texts = [t.format(name) for name in classes.names for t in TEMPLATES]
    found = classes.of(classes._tokenizer(texts))
    np.testing.assert_array_equal(found, np.repeat(np.arange(8), 2))


def test_a_label_outside_the_head_is_refused(classes):
    tokens = classes._tokenizer(["a red bar", "a pink bar"])
    with pytest.raises(DataError, match="the label 'a pink bar', which is none of the 8"):
        classes.of(tokens)


def test_classes_with_equal_tokens_are_refused(pale):
    short = train_bpe(["a red bar"], 300, 3)  # no room for the second word
    with pytest.raises(ConfigError, match="are the same 3 tokens in the templates"):
        Classes(DataConfig(pale, label="label", templates=("a long sentence of a {}",)), short)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "flyp"}, "set data.label to the feature"),
        ({"objective": "classification", **LABELS}, "set init_from, and init_towers"),
        (
            {"objective": "classification", "init_from": "m", "text_masking": 0.5, **LABELS},
            "reads no text",
        ),
    ],
)
def test_an_invalid_objective_is_refused(tiny, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


# ---------------------------------------------------------------------------------- steps


def steps(experiment, devices: int, count: int = 4) -> tuple[list[float], object]:
    trainer = Trainer(experiment, make_mesh(MeshConfig(), jax.devices()[:devices]), classes=8)
    state = trainer.init(jnp.int32(20))
    random = np.random.default_rng(0)
    kernel = random.standard_normal((8, 16)).astype(np.float32)
    if experiment.objective == "classification":
        state.params["head"]["kernel"] = jax.device_put(
            kernel, trainer.state_shardings.params["head"]["kernel"]
        )
    losses = []
    for _ in range(count):
        batch = {
            "images": random.integers(0, 256, (16, 16, 16, 3), np.uint8),
            "tokens": random.integers(2, 250, (16, 16)).astype(np.int32),
            "classes": random.integers(0, 8, 16).astype(np.int32),
        }
        before = jax.tree.map(jnp.copy, state)
        state, metrics = trainer.step(state, global_batch(batch, trainer.mesh))
        losses.append(float(metrics["loss"]))
    return losses, (trainer, before, batch, state)


@pytest.mark.parametrize("objective", ["classification", "flyp"])
def test_one_device_and_eight_and_micro_batches_agree(tiny, pale, objective):
    experiment = made(tiny, pale, objective=objective, vision={"depth": 1}, text={"depth": 1})
    losses, (trainer, before, batch, after) = steps(experiment, 1)
    assert losses[-1] == pytest.approx(_by_hand(trainer, before, batch), rel=1e-5)
    cut = dataclasses.replace(experiment, micro_batch_size=8)
    np.testing.assert_allclose(steps(cut, 8)[0], losses, rtol=1e-5)
    trained = set(after.params)
    if objective == "classification":
        assert trained == {"vision", "head"}
        assert trainer.tokens_per_step(16) == 16 * 16  # of images alone
        assert set(after.frozen) == {"text", "logit_scale", "logit_bias"}
    else:
        assert trained == {"vision", "text", "logit_scale", "logit_bias"}


def _by_hand(trainer, state, batch) -> float:
    z_image = np.asarray(trainer.embed_images(state, batch["images"]))
    params = state.params | state.frozen
    scale, n = float(jnp.exp(params["logit_scale"])), np.arange(16)
    if trainer.experiment.objective == "classification":
        logits = scale * z_image @ np.asarray(params["head"]["kernel"]).T
        own = logits[n, batch["classes"]]
        return float(np.mean(np.log(np.exp(logits).sum(1)) - own))
    z_text = np.asarray(trainer.embed_texts(state, batch["tokens"]))
    logits = scale * z_image @ z_text.T + float(params["logit_bias"])
    same = (batch["classes"][:, None] == batch["classes"]) & ~np.eye(16, dtype=bool)
    assert same.any()
    sign = 2 * np.eye(16) - 1
    return float(np.where(same, 0, np.logaddexp(0, -sign * logits)).sum() / 16)


# ----------------------------------------------------------------------------------- runs


@pytest.mark.slow
def test_a_classification_starts_at_zero_shot_and_writes_a_classifier(learned, pale, tmp_path):
    experiment = Experiment(
        init_from=learned,
        objective="classification",
        data=DataConfig(pale, **LABELS["data"]),
        batch_size=16,
        steps=40,
        eval_every=0.5,
        run_dir=str(tmp_path / "run"),
    )
    run = train(experiment)
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    measured = {row["step"]: row["eval/top1"] for row in lines if "eval/top1" in row}
    rows = [json.loads(line) for line in Path(pale, "captions.jsonl").read_text().splitlines()]
    tested = [row for row in rows if row["split"] == "test"]
    images = [f"{pale}/{row['image']}" for row in tested]
    model, tuned = vlm.load(learned), vlm.load(run)

    def right(classifier) -> float:
        top = classifier(images).top(1)
        return float(np.mean([t[0][0] == row["label"] for t, row in zip(top, tested, strict=True)]))

    names = sorted({row["label"] for row in rows})
    zero_shot = right(ZeroShotClassifier(model, names, TEMPLATES))
    assert measured[0] == pytest.approx(zero_shot)
    kept = ZeroShotClassifier.load(run / "classifier.safetensors", tuned)
    assert kept.labels == tuple(names)
    assert right(kept) >= max(zero_shot, measured[20] - 0.05)
    results = json.loads((run / "results.json").read_text())["results"]
    assert results[0]["metrics"]["top1"]["value"] == pytest.approx(right(kept))
    # The text tower is as it was.
    np.testing.assert_array_equal(tuned.encode_text(["a bar"]), model.encode_text(["a bar"]))
    # A resumed run keeps the order of the head's rows.
    labels = json.loads((run / "classes.json").read_text())
    assert labels == names
    (run / "classes.json").write_text(json.dumps(labels[::-1]))
    with pytest.raises(CheckpointError, match="in another order"):
        train(resume=run)
    (run / "classes.json").unlink()
    with pytest.raises(CheckpointError, match="started by an older version"):
        train(resume=run)
