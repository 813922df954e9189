"""Evaluations of a run: data read once, images opened on use, and correct scores."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vlm.config import EvalConfig
from vlm.data.sources import vocabulary_texts
from vlm.errors import DataError
from vlm.evaluation.metrics import pair_retrieval_metrics, zero_shot_metrics
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import train_bpe
from vlm.sharding import make_mesh
from vlm.training.eval_tasks import Embedder, open_task
from vlm.training.evals import Evaluations
from vlm.training.schedule import is_scheduled
from vlm.training.step import Trainer


@pytest.fixture(scope="module")
def walls(tmp_path_factory) -> str:
    """Eleven images of one grey each, with a label and two captions."""
    folder = tmp_path_factory.mktemp("walls")
    rows = []
    for i in range(11):
        Image.new("RGB", (20, 12), (20 * i, 20 * i, 20 * i)).save(folder / f"{i}.png")
        captions = {"caption": f"wall {i}", "other": f"a wall like {i}"}
        rows.append({"image": f"{i}.png", "label": f"k{i % 3}", "split": "val", **captions})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


@pytest.fixture(scope="module")
def parts(tiny):
    """A trainer on four devices, a state, and a tokenizer."""
    experiment = tiny()
    trainer = Trainer(experiment, make_mesh(experiment.mesh, jax.devices()[:4]))
    texts = vocabulary_texts(experiment.data)
    return trainer, trainer.init(jnp.int32(1)), train_bpe(texts, 300, 16)


@pytest.fixture
def opened(monkeypatch):
    """The names of all images that are opened."""
    names = []
    plain = Preprocess.open

    def watched(self, image, name="the image"):
        names.append(name)
        return plain(self, image, name)

    monkeypatch.setattr(Preprocess, "open", watched)
    return names


def embeddings(parts, walls, texts):
    """All images and some texts, one batch each, by the functions of the trainer."""
    trainer, state, tokenizer = parts
    images = [trainer.preprocess.pixels(f"{walls}/{i}.png") for i in range(11)]
    images = np.stack([*images, images[0]])  # four devices
    rows = -len(texts) % 4
    tokens = tokenizer([*texts, *texts[:1] * rows])
    z_image, z_text = trainer.embed_images(state, images), trainer.embed_texts(state, tokens)
    return np.asarray(z_image)[:11], np.asarray(z_text)[: len(texts)]


def test_retrieval_has_all_captions_of_an_image_as_positives(parts, walls, opened):
    trainer, state, tokenizer = parts
    config = EvalConfig("walls", "retrieval", walls, "val", captions=("caption", "other"))
    task = open_task(config, Embedder(trainer), tokenizer)
    assert opened == []  # its texts are read, and no image
    got = task.measure(state)
    assert len(opened) == 11
    texts = [text for i in range(11) for text in (f"wall {i}", f"a wall like {i}")]
    z_image, z_text = embeddings(parts, walls, texts)
    pairs = np.array([(i // 2, i) for i in range(22)])
    assert got == pair_retrieval_metrics(z_image, z_text, pairs)
    assert got["image_to_text_R@1"].n == 11
    assert got["text_to_image_R@1"].n == 22


def test_zero_shot_averages_the_prompts_of_named_classes(parts, walls, opened, tmp_path):
    trainer, state, tokenizer = parts
    names = tmp_path / "names.txt"
    names.write_text("k1\tone\nk0\tzero\nk2\ttwo\n")
    templates = ("a {}", "the {} wall", "{}")
    config = EvalConfig(
        "walls", source=walls, split="val", class_names=str(names), templates=templates
    )
    task = open_task(config, Embedder(trainer), tokenizer)
    assert opened == []
    got = task.measure(state)
    prompts = [t.replace("{}", name) for name in ("zero", "one", "two") for t in templates]
    z_image, z_text = embeddings(parts, walls, prompts)
    z = z_text.reshape(3, 3, -1).mean(1)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    assert got == zero_shot_metrics(z_image, z, np.arange(11) % 3)
    first = dataclasses.replace(config, examples=4)
    assert open_task(first, Embedder(trainer), tokenizer).measure(state)["top1"].n == 4


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "there is no file of class names"),
        ("one\ntwo", "has 2 lines for the 3 labels .* none names 'k0'"),
        ("k0\tone\nk1\ttwo", "none names 'k2'"),
    ],
)
def test_class_names_that_do_not_fit_are_refused(parts, walls, tmp_path, lines, message):
    trainer, _, tokenizer = parts
    names = tmp_path / "names.txt"
    if lines is not None:
        names.write_text(lines)
    config = EvalConfig("walls", source=walls, split="val", class_names=str(names))
    with pytest.raises(DataError, match=message):
        open_task(config, Embedder(trainer), tokenizer)


def test_a_run_is_evaluated_on_its_own_split_and_on_other_data(parts, tiny, walls, opened):
    trainer, state, tokenizer = parts
    evals = (EvalConfig("walls", "retrieval", walls, "val", captions=("caption",)),)
    experiment = tiny(evals=evals, data={"eval_split": "test"})
    evaluations = Evaluations(experiment, trainer, tokenizer)
    assert evaluations
    assert opened == []  # no image of the training split, ever
    row = evaluations.metrics(state)
    assert {"top1", "image_to_text_R@1", "walls/image_to_text_R@1"} <= set(row)
    assert len(opened) == 8 + 11
    assert not Evaluations(tiny(), trainer, tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_every": 0.5}, "data.eval_split is not set, and evals is empty"),
        ({"eval_every": 0.0, "data": {"eval_split": "test"}}, "eval_every is 0"),
    ],
)
def test_one_option_turns_evaluation_off(tiny, parts, changes, message):
    experiment = tiny(**changes)
    evaluations = Evaluations(experiment, parts[0], parts[-1])
    assert not evaluations
    assert evaluations.description == f"none: {message}"
    assert not is_scheduled(1, 12, 0.0)
