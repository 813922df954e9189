"""Text length buckets: the loss and gradients of texts that are all padded to the whole context."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import losses as logged
from processes import weights

import vlm
from vlm.config import TextConfig
from vlm.data.text_buckets import TextBuckets
from vlm.errors import ConfigError
from vlm.models.text import shortened, used_lengths
from vlm.sharding import global_batch, make_mesh
from vlm.training.loop import train
from vlm.training.schedule import text_buckets
from vlm.training.step import Trainer

TOWERS = {
    "clip": {"causal": True, "pool": "end", "end_id": 1},
    "argmax": {"causal": True, "pool": "argmax"},
    "masked mean": {"pool": "mean", "pad_id": 0},
    "masked map": {"pool": "map", "pad_id": 0},
    "masked first": {"pool": "first", "pad_id": 0},
    "masked max": {"pool": "max", "pad_id": 0, "positions": "sinusoidal"},
}
LENGTHS = (4, 8)


def tokens_of(lengths, seed: int = 0) -> np.ndarray:
    """Random texts of these lengths, with their end token 1."""
    random, rows = np.random.default_rng(seed), np.zeros((len(lengths), 16), np.int32)
    for row, length in zip(rows, lengths, strict=True):
        row[: length - 1] = random.integers(2, 250, length - 1)
        row[length - 1] = 1
    return rows


def batch(step: int, rows: int = 16) -> dict:
    random = np.random.default_rng(step)
    lengths = np.minimum(random.geometric(0.2, rows) + 1, 16)
    images = random.integers(0, 256, (rows, 16, 16, 3), np.uint8)
    return {"images": images, "tokens": tokens_of(lengths, step)}


def made(experiment, devices: int) -> Trainer:
    return Trainer(experiment, make_mesh(experiment.mesh, jax.devices()[:devices]))


# ------------------------------------------------------------------------------- lengths


def test_used_lengths_are_those_that_an_embedding_depends_on():
    tokens = tokens_of([3, 16, 2])
    for changes in (TOWERS["clip"], TOWERS["masked mean"]):
        config = TextConfig(context_length=16, **changes)
        assert used_lengths(tokens, config).tolist() == [3, 16, 2]
        assert shortened(tokens[[0, 2]], config).shape == (2, 16)
        assert shortened(tokens[[0, 2]], config, step=1).shape == (2, 3)
    left = np.roll(tokens_of([3]), 13, axis=1)  # padding on the left
    assert used_lengths(left, TextConfig(pool="mean", pad_id=0)).tolist() == [16]
    for changes in ({}, {"pool": "mean"}, {"pool": "class", "causal": True, "pad_id": 0}):
        config = TextConfig(**changes)
        assert used_lengths(tokens, config) is None
        assert shortened(tokens, config) is tokens
    assert shortened(tokens[:0], TextConfig(pool="mean", pad_id=0)).shape == (0, 16)


@pytest.mark.parametrize("name", TOWERS)
def test_cut_texts_have_the_same_embeddings(tiny, name):
    trainer = made(tiny(text={"depth": 2} | TOWERS[name]), 1)
    model = trainer.model(trainer.init(jnp.int32(1)))
    tokens = tokens_of([3, 5, 4])
    if name == "argmax":
        tokens[tokens == 1] = 299
    cut = shortened(tokens, trainer.experiment.model.text, step=1)
    assert cut.shape == (3, 5)
    z, whole = (model.encode_text(jnp.asarray(rows)) for rows in (cut, tokens))
    np.testing.assert_allclose(z, whole, atol=1e-6)


# ------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(("devices", "parts"), [(1, 1), (4, 1), (2, 2)])
def test_a_split_batch_has_the_pairs_of_each_device_in_the_order_of_its_tokens(devices, parts):
    config = TextConfig(context_length=16, **TOWERS["clip"])
    buckets = TextBuckets((*LENGTHS, 16), config, devices=devices, parts=parts)
    tokens = batch(0, 32)["tokens"]
    rows = {"tokens": tokens, "images": np.arange(32), "other": {"x": np.arange(32)[:, None]}}
    split = buckets.split(rows, buckets.needs(tokens), first_row=64)
    assert sorted(split["rows"]) == list(range(64, 96))
    np.testing.assert_array_equal(split["images"], split["rows"] - 64)
    np.testing.assert_array_equal(split["other"]["x"][:, 0], split["images"])
    assert [part.shape[1] for part in split["tokens"]] == [4, 8, 16]
    assert sum(len(part) for part in split["tokens"]) == 32
    # As the step joins them: by device, and by micro-batch within it.
    by_device = [
        np.pad(part, ((0, 0), (0, 16 - part.shape[1]))).reshape(devices, -1, parts, 16)
        for part in split["tokens"]
    ]
    joined = np.concatenate(by_device, axis=1).reshape(32, 16)
    np.testing.assert_array_equal(joined, tokens[split["images"]])


def test_larger_needs_than_those_of_the_batch_only_add_padding():
    """Other processes may have longer texts."""
    buckets = TextBuckets((*LENGTHS, 16), TextConfig(context_length=16, **TOWERS["clip"]))
    tokens = tokens_of([3, 4, 2, 5, 3, 4, 8, 9])
    assert buckets.needs(tokens).tolist() == [3, 1]
    split = buckets.split({"tokens": tokens}, np.array([8, 2]))
    assert [part.shape for part in split["tokens"]] == [(6, 8), (2, 16)]
    none = buckets.split({"tokens": tokens[:6]}, buckets.needs(tokens[:6]))
    assert [part.shape for part in none["tokens"]] == [(5, 4), (1, 8)]  # none of the whole context


# -------------------------------------------------------------------------------- a step


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_loss_and_gradients_are_those_of_the_whole_context(tiny, loss):
    """On eight devices, in micro-batches, with dropout and patch dropout in the vision tower."""
    noise = {"dropout": 0.1, "patch_dropout": 0.5}
    model = {"loss": loss, "init_bias": -2.0 if loss == "sigmoid" else None}
    e = tiny(vision=noise, text=TOWERS["clip"], model=model, optimizer={"eps": 1e-3})
    e = dataclasses.replace(e, batch_size=32)
    short = dataclasses.replace(e, text_lengths=LENGTHS)
    data, results = [batch(step, 32) for step in range(2)], []
    for experiment, devices in (
        (e, 1), (short, 1), (short, 8), (dataclasses.replace(short, micro_batch_size=16), 8),
    ):  # fmt: skip
        trainer = made(experiment, devices)
        buckets = text_buckets(experiment, trainer.mesh)
        state, found = trainer.init(jnp.int32(20)), []
        for rows in data:
            if buckets is not None:
                rows = buckets.split(rows, buckets.needs(rows["tokens"]))
                sizes = sum(part.size for part in rows["tokens"])
                assert sizes < 0.8 * 32 * 16
            state, metrics = trainer.step(state, global_batch(rows, trainer.mesh))
            found.append(float(metrics["loss"]))
        if buckets is not None:
            assert metrics["tokens"] == 32 * 8 + sizes  # half of the patches
        results.append((found, state.params))
    for losses, params in results[1:]:
        np.testing.assert_allclose(losses, results[0][0], rtol=1e-6)
        for x, y in zip(*map(jax.tree.leaves, (results[0][1], params)), strict=True):
            np.testing.assert_allclose(y, x, atol=1e-6)


def of_tokens(inputs: vlm.losses.LossInputs):
    return inputs.batch["tokens"].sum() + 0.0 * inputs.z_image.sum()


@pytest.mark.slow
@pytest.mark.untyped  # fields that take objects hold their import paths
def test_a_loss_of_the_user_reads_whole_tokens(tiny):
    loss = (vlm.config.Code.of(of_tokens), 1.0)
    e = tiny(text=TOWERS["clip"], losses=(loss,), text_lengths=LENGTHS)
    trainer, rows = made(e, 2), batch(0)
    buckets = text_buckets(e, trainer.mesh)
    split = buckets.split(rows, buckets.needs(rows["tokens"]))
    _, metrics = trainer.step(trainer.init(jnp.int32(2)), global_batch(split, trainer.mesh))
    assert float(metrics["loss"]) == rows["tokens"].sum()


# ---------------------------------------------------------------------------------- runs


@pytest.mark.slow
def test_a_run_with_buckets_is_one_without_and_resumes(tiny, tmp_path):
    e = tiny(steps=8, log_every=1, keep_checkpoints=9, checkpoint_every=0.25, text=TOWERS["clip"])
    runs = {name: tmp_path / name for name in ("whole", "short")}
    train(dataclasses.replace(e, run_dir=str(runs["whole"])))
    short = dataclasses.replace(e, text_lengths=(10, 11), run_dir=str(runs["short"]))
    train(short)
    np.testing.assert_allclose(logged(runs["short"]), logged(runs["whole"]), rtol=1e-5)
    rows = [json.loads(line) for line in (runs["short"] / "log.jsonl").read_text().splitlines()]
    assert any("tokens_per_s" in row for row in rows)
    again = tmp_path / "again"
    shutil.copytree(runs["short"], again)
    shutil.rmtree(again / "bundle")
    for step in (6, 8):
        shutil.rmtree(again / "checkpoints" / str(step))
    train(resume=again)
    assert weights(again) == weights(runs["short"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_lengths": (4, 16)}, "text_lengths has 16 tokens, and the context is 16"),
        ({"text": {"pool": "last", "pad_id": None}}, 'this one pools "last" and has no pad_id'),
        (
            {"text": {"pool": "class", "causal": True, "pad_id": 0, "end_id": None}},
            'pools "class" and reads a position after the padding',
        ),
        ({"text_masking": 0.5}, "does not fit text_masking 0.5, which drops padding first"),
        ({"text": TOWERS["clip"] | {"dropout": 0.1}}, "does not fit model.text.dropout 0.1"),
        ({"steps": None, "seconds": 5.0}, "does not fit seconds 5.0"),
        (
            {"selection": vlm.config.SelectionConfig(score="hard_learner")},
            "does not fit selection 'hard_learner', which chooses rows",
        ),
    ],
)
def test_what_buckets_do_not_fit_is_refused(tiny, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**({"text": TOWERS["clip"], "text_lengths": LENGTHS} | changes))
