"""Averages of models: exact at their ends, refused where they mean nothing, greedy by a task."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from PIL import Image

import vlm
from vlm.adaptation import blend, soup, sweep_alpha
from vlm.bundle import Bundle, load
from vlm.errors import ConfigError
from vlm.evaluation.tasks import DataInfo, ZeroShotTask


@pytest.fixture(scope="module")
def start():
    return load(tiny.run())


def moved(model, seed, size=0.2):
    """The model after a random step of every parameter."""
    rng = np.random.default_rng(seed)
    state = jax.tree.map(
        lambda x: (
            x + size * rng.standard_normal(x.shape).astype(np.float32) * (0.1 + np.abs(x).mean())
        ),
        nnx.state(model.model),
    )
    return model.with_parameters(state, f"moved {seed}")


@pytest.fixture(scope="module")
def tuned(start):
    return moved(start, 0)


@pytest.fixture(scope="module")
def task():
    folder = tiny.folder() / "data"
    names = [f"a {colour} {shape}" for colour in tiny.COLOURS for shape in ("square", "stripe")]
    files = [folder / f"test-{name[2:].replace(' ', '-')}.png" for name in names]
    images = [Image.open(file) for file in files]
    return ZeroShotTask(images, names, list(range(6)), DataInfo("shapes"), ks=(1,))


def leaves(model):
    return [np.asarray(x) for x in jax.tree.leaves(nnx.state(model.model))]


def test_the_ends_are_the_models_to_the_bit(start, tuned):
    for alpha, end in ((0.0, start), (1.0, tuned)):
        for ours, theirs in zip(leaves(blend(start, tuned, alpha)), leaves(end), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_every_parameter_is_blended(start, tuned):
    made = blend(start, tuned, 0.25)
    for x, a, b in zip(leaves(made), leaves(start), leaves(tuned), strict=True):
        assert not np.array_equal(a, b)
        np.testing.assert_allclose(x, 0.75 * a + 0.25 * b, rtol=1e-6, atol=1e-7)
    assert made.logit_scale == pytest.approx(start.logit_scale**0.75 * tuned.logit_scale**0.25)
    pixels = np.full((1, 16, 16, 3), 90, np.uint8)
    assert not np.allclose(made.encode_image(pixels), start.encode_image(pixels), atol=1e-4)
    fresh = Bundle(made.model, made.preprocess, made.tokenizer, "fresh")
    np.testing.assert_array_equal(made.encode_image(pixels), fresh.encode_image(pixels))


def test_a_uniform_soup_is_the_mean_in_any_order(start, tuned):
    third = moved(start, 1)
    made = soup([start, tuned, third])
    for x, *parts in zip(*map(leaves, (made, start, tuned, third)), strict=True):
        np.testing.assert_allclose(x, np.mean(parts, axis=0), rtol=1e-5, atol=1e-7)
    assert made.name == f"soup of {start.name}, moved 0, moved 1"
    for x, y in zip(leaves(soup([start])), leaves(start), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_greedy_soup_leaves_out_what_harms(start, task):
    broken = moved(start, 2, size=30.0)
    made = soup([broken, start], task)
    assert made.name == f"soup of {start.name}"
    for x, y in zip(leaves(made), leaves(start), strict=True):
        np.testing.assert_array_equal(x, y)
    once = dataclasses.replace(task, images=iter(task.images))  # read a second time all the same
    twice = soup([start, start], once)
    assert twice.name == f"soup of {start.name}, {start.name}"


def test_a_sweep_begins_and_ends_at_the_models(start, tuned, task):
    made = sweep_alpha(start, tuned, {"in": task, "out": task}, (0.0, 0.5, 1.0))
    for model, point in ((start, made.points["in"][0]), (tuned, made.points["in"][2])):
        assert point == task.measure(model).metrics["top1"]
    assert made.points["in"] == made.points["out"]
    drawing = made.svg()
    assert drawing.count("<polyline") == 2
    assert "in at alpha 0.5: " in drawing


def test_only_the_matryoshka_sizes_of_all_models_remain(start, tuned, tmp_path):
    sizes = {"a": (4, 8), "b": (8, 12)}
    models = []
    for model, name in ((start, "a"), (tuned, "b")):
        copy = model.with_parameters(nnx.state(model.model), name)
        copy.model.config = dataclasses.replace(model.config, matryoshka=sizes[name])
        models.append(copy)
    half = blend(*models)
    half.save(tmp_path / "half")
    assert half.config.matryoshka == load(tmp_path / "half").config.matryoshka == (8,)
    assert blend(*models, 0.0).config.matryoshka == (4, 8)
    assert soup([models[1], start]).config.matryoshka == ()
    for ours, theirs in zip(leaves(half), leaves(blend(start, tuned)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_differs_is_named(start, tuned):
    c = start.config
    other = vlm.config.ModelConfig(
        vision=vlm.ViTConfig(**{**vars(c.vision), "width": 8, "depth": 2, "dropout": 0.1}),
        text=c.text,
        embed_dim=c.embed_dim,
    )
    model = vlm.models.DualEncoder(other, rngs=nnx.Rngs(0))
    wider = Bundle(model, start.preprocess, start.tokenizer, "wider")
    with pytest.raises(ConfigError, match=r"model.vision.width is 16 and 8; .*depth is 1 and 2"):
        blend(start, wider)
    with pytest.raises(ConfigError, match="wider cannot be averaged"):
        soup([start, tuned, wider])


def test_other_pixels_and_other_tokens_are_refused(start):
    rules = {**vars(start.preprocess.config), "mean": (0.1, 0.2, 0.3)}
    pixels = vlm.inputs.preprocess.Preprocess(vlm.PreprocessConfig(**rules))
    darker = Bundle(start.model, pixels, start.tokenizer, "darker")
    with pytest.raises(ConfigError, match=r"preprocess\.mean is"):
        blend(start, darker)
    tokens = vlm.inputs.tokenizer.train_bpe(["another vocabulary here"], 262, 12)
    other = Bundle(start.model, start.preprocess, tokens, "other")
    with pytest.raises(ConfigError, match="vocabularies differ"):
        blend(start, other)
    half = load(tiny.run(), tower="vision")
    with pytest.raises(ConfigError, match=r"model\.text is 'loaded' and 'left out'"):
        blend(start, half)


@pytest.mark.untyped
def test_bad_shares_and_nothing_at_all(start, tuned):
    for alpha in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=f"alpha is {alpha}"):
            blend(start, tuned, alpha)
    with pytest.raises(ConfigError, match="no models to average"):
        soup([])
    with pytest.raises(ConfigError, match="no tasks"):
        sweep_alpha(start, tuned, {})
