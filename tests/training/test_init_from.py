"""Fine-tuning: config, tokenizer and weights taken from another model."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import vlm
from vlm.config import (
    DataConfig,
    Experiment,
    OptimizerConfig,
    PreprocessConfig,
    from_dict,
    to_dict,
)
from vlm.config.defaults import fine_tuning_rate, resumed_experiment, with_defaults
from vlm.errors import CheckpointError, ConfigError
from vlm.training.init_from import _check_same, init_tokenizer, resolve
from vlm.training.loop import train
from vlm.weights.instantiate import abstract_model
from vlm.weights.rules import flat_shapes

GOLDEN = Path(__file__).parents[1] / "weights" / "golden"
FAMILIES = (  # one of each kind of tower, and what is odd about its pixels or tokens
    "hf_clip", "hf_naflex", "hf_siglip", "hf_altclip", "oc_coca", "oc_convnext", "oc_fastvit",
    "oc_vitamin", "oc_xlm_roberta", "hf_align",
)  # fmt: skip


def rows(run) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------- what it takes


@pytest.mark.parametrize("name", FAMILIES)
def test_model_preprocessing_and_tokenizer_are_the_checkpoints(name):
    path = GOLDEN / name
    e = resolve(Experiment(init_from=str(path), steps=1))
    theirs = vlm.load(path)
    assert flat_shapes(abstract_model(e.model, jnp.float32)) == flat_shapes(theirs.model)
    _check_same(e, theirs, ("vision", "text"))
    assert (e.model.loss, e.model.init_bias) == (theirs.loss, theirs.config.init_bias)
    assert init_tokenizer(e).config == e.tokenizer == theirs.tokenizer.config
    assert e.preprocess == theirs.preprocess.config
    assert getattr(e.model.vision, "max_patches", None) == e.preprocess.max_patches
    # Written in full, so that nobody asks the model again.
    assert resolve(from_dict(Experiment, to_dict(e))) == e


def test_set_fields_override_the_checkpoint():
    path = str(GOLDEN / "hf_clip")
    plain = resolve(Experiment(init_from=path))
    size = 2 * plain.model.vision.image_size
    e = resolve(Experiment(init_from=path, init_image_size=size, init_context_length=8))
    assert e.model.vision.image_size == e.preprocess.image_size == size
    assert e.model.text.context_length == e.tokenizer.context_length == 8
    assert e.init_image_size is None
    _check_same(e, vlm.load(path, image_size=size, context_length=8), ("vision", "text"))
    pixels = dataclasses.replace(plain.preprocess, resize="squash", image_size=size)
    e = resolve(Experiment(init_from=path, preprocess=pixels))
    assert (e.preprocess, e.model.vision.image_size) == (pixels, size)
    assert e.model.text == plain.model.text


def test_a_run_takes_the_long_texts_of_fgclip2_if_it_asks_for_them():
    path = str(GOLDEN / "hf_fgclip2")
    short, long = (resolve(Experiment(init_from=path, init_context_length=n)) for n in (None, 23))
    lengths = [(e.model.text.context_length, e.tokenizer.context_length) for e in (short, long)]
    assert lengths == [(11, 11), (23, 23)]
    _check_same(long, vlm.load(path, context_length=23), ("vision", "text"))
    with pytest.raises(ConfigError, match=r"context_length 24: .* choose at most 23"):
        resolve(Experiment(init_from=path, init_context_length=24))


def test_a_run_takes_any_aspect_or_squares_as_its_config_says():
    path = str(GOLDEN / "hf_naflex")
    plain = resolve(Experiment(init_from=path))
    assert (plain.preprocess.resize, plain.preprocess.max_patches) == ("naflex", 31)
    wide = resolve(Experiment(init_from=path, init_image_size=48))
    assert wide.preprocess.max_patches == wide.model.vision.max_patches == 64
    assert wide.model.vision.image_size == plain.model.vision.image_size
    wide = dataclasses.replace(plain.preprocess, max_patches=100)
    e = resolve(Experiment(init_from=path, preprocess=wide))
    assert (e.preprocess, e.model.vision.max_patches) == (wide, 100)
    squares = PreprocessConfig(image_size=plain.preprocess.image_size)
    e = resolve(Experiment(init_from=path, preprocess=squares))
    assert (e.preprocess, e.model.vision.max_patches) == (squares, None)
    _check_same(e, vlm.load(path), ("text",))
    e = resolve(Experiment(init_from=path, model=e.model))
    assert (e.preprocess.resize, e.preprocess.max_patches) == ("squash", None)
    # And the other way: a model of square images becomes one of any aspect.
    path = str(GOLDEN / "hf_siglip")
    square = resolve(Experiment(init_from=path))
    size = square.model.vision.patch_size
    pixels = dataclasses.replace(
        square.preprocess, resize="naflex", patch_size=size, max_patches=20
    )
    e = resolve(Experiment(init_from=path, preprocess=pixels))
    assert e.model.vision == dataclasses.replace(square.model.vision, max_patches=20)
    _check_same(e, vlm.load(path), ("vision", "text"))
    path = str(GOLDEN / "oc_convnext")
    size = resolve(Experiment(init_from=path)).preprocess.image_size
    pixels = dataclasses.replace(pixels, image_size=size)
    with pytest.raises(ConfigError, match="a ConvNeXtConfig, and only a Vision Transformer takes"):
        resolve(Experiment(init_from=path, preprocess=pixels))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"init_from": "gone"}, CheckpointError, "there is no model 'gone': check the path"),
        ({"init_image_size": 17}, ConfigError, "image_size 17 is not tiled by patches"),
        ({"init_context_length": 999}, ConfigError, "context_length 999: .* choose at most"),
        ({"init_from": None, "init_image_size": 32}, ConfigError, "name one, and leave model out"),
    ],
)
def test_an_invalid_start_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        resolve(Experiment(**({"init_from": str(GOLDEN / "hf_clip")} | changes)))


def test_a_contradiction_is_named():
    e = resolve(Experiment(init_from=str(GOLDEN / "hf_clip")))
    text = dataclasses.replace(e.model.text, activation="relu")
    rules = dataclasses.replace(e.tokenizer, pad_id=5)
    wrong = dataclasses.replace(e, model=dataclasses.replace(e.model, text=text), tokenizer=rules)
    with pytest.raises(
        ConfigError, match=r"text\.activation is 'quick_gelu' in the model and 'relu'"
    ):
        _check_same(wrong, vlm.load(e.init_from), ("vision", "text"))
    with pytest.raises(ConfigError, match=r"tokenizer\.pad_id is .* in the model and 5 in"):
        init_tokenizer(wrong)


# ------------------------------------------------------------------- what does not collapse


def test_default_learning_rates():
    assert with_defaults(Experiment()).optimizer.learning_rate == 1e-3
    tuned = Experiment(init_from="model", batch_size=512)
    assert with_defaults(tuned).optimizer.learning_rate == 1e-5
    assert with_defaults(tuned).optimizer.warmup == 0.1
    small = with_defaults(dataclasses.replace(tuned, batch_size=128))
    assert small.optimizer.learning_rate == 5e-6
    assert fine_tuning_rate(dataclasses.replace(small, batch_size=65536)) == 1e-5
    narrow = dataclasses.replace(
        small.model,
        vision=dataclasses.replace(small.model.vision, width=192, heads=3, projection="linear"),
        text=dataclasses.replace(small.model.text, width=96),
    )
    assert fine_tuning_rate(dataclasses.replace(small, model=narrow)) == 2e-5
    named = dataclasses.replace(tuned, optimizer=OptimizerConfig(learning_rate=3e-4, warmup=0.0))
    assert with_defaults(named).optimizer == named.optimizer
    # One tower alone is not fine-tuning: the other learns from nothing.
    lit = dataclasses.replace(tuned, init_towers="vision", lock="vision")
    assert with_defaults(lit).optimizer.learning_rate == 1e-3


def test_a_resumed_run_keeps_unset_fields():
    before = with_defaults(Experiment(init_from="gone", steps=5))
    again = resumed_experiment(Experiment(init_from="gone", init_image_size=32, steps=9), before)
    assert again == dataclasses.replace(before, steps=9)


@pytest.mark.slow
def test_a_fine_tuned_model_never_falls_under_its_start(learned, pale, tmp_path):
    """Without model, learning rate and tokenizer in the config."""
    experiment = Experiment(
        init_from=learned,
        data=DataConfig(source=pale),
        batch_size=16,
        steps=60,
        eval_every=0.2,
        run_dir=str(tmp_path / "run"),
    )
    run = train(experiment)
    measured = {row["step"]: row["eval/top1"] for row in rows(run) if "eval/top1" in row}
    config = from_dict(Experiment, json.loads((run / "config.json").read_text()))
    assert config.model == vlm.load(learned).config

    assert list(measured) == [0, 12, 24, 36, 48]
    first, last, count = _accuracy(learned, pale), _accuracy(run, pale), len(_tested(pale))
    assert measured[0] == pytest.approx(first)  # the checkpoint's own
    interval = 1.96 * np.sqrt(first * (1 - first) / count)
    assert min(measured.values()) > first - interval
    assert last > first + 0.1  # and it learns


def _accuracy(model, source: str) -> float:
    tested = _tested(source)
    captions = sorted({row["caption"] for row in tested})
    classify = vlm.ZeroShotClassifier(vlm.load(model), captions, ("{}",))
    found = classify([row["image"] for row in tested]).top(1)
    return float(
        np.mean([best[0][0] == row["caption"] for best, row in zip(found, tested, strict=True)])
    )


def _tested(source: str) -> list[dict]:
    lines = map(json.loads, (Path(source) / "captions.jsonl").read_text().splitlines())
    return [row | {"image": f"{source}/{row['image']}"} for row in lines if row["split"] == "test"]
