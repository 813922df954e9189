"""BLIP-2: several vectors of an image, compared with one of a text.

Its vectors and logits are compared with transformers' in test_golden.py.
"""

import json
import pathlib
import shutil

import numpy as np
import pytest

import vlm
from vlm.config import QFormerConfig
from vlm.errors import CheckpointError, ConfigError
from vlm.evaluation.distributed import DistributedModel

GOLDEN = pathlib.Path(__file__).parent / "golden" / "hf_blip2"
TEXTS = ["a photo of a cat", "Two DOGS!", "x"]


@pytest.fixture(scope="module")
def blip2():
    return vlm.load(GOLDEN)


@pytest.fixture(scope="module")
def golden():
    found = np.load(GOLDEN / "outputs.npz")
    texts = found["texts"].tolist()
    logits = found["logits"][:, [texts.index(text) for text in TEXTS]]
    return [found[f"image/{i}"] for i in range(3)], logits


def test_scores_are_the_largest_cosine(blip2, golden, tmp_path):
    images, logits = golden
    classify = vlm.ZeroShotClassifier(blip2, {text: [text] for text in TEXTS})
    assert np.abs(classify(images).logits - logits).max() < 5e-6
    index = vlm.heads.MultiVectorIndex(blip2)
    index.add(images)
    assert repr(index).startswith("MultiVectorIndex(3 items, 15 vectors")
    scores = np.stack([index.scores(text) for text in TEXTS], axis=1)
    assert np.abs(scores - logits).max() < 5e-6
    index.save(tmp_path / "index")
    again = vlm.heads.MultiVectorIndex.load(tmp_path / "index", blip2)
    assert [hit.id for hit in again.search("x", k=3)] == np.argsort(-logits[:, 2]).tolist()
    classify.save(tmp_path / "labels.safetensors")
    loaded = vlm.ZeroShotClassifier.load(tmp_path / "labels.safetensors", blip2)
    assert np.array_equal(loaded(images).logits, classify(images).logits)


@pytest.mark.parametrize("name", ["hf_blip", "hf_blip2"])
def test_scores_without_a_temperature_are_logged(name, golden, caplog):
    with caplog.at_level("INFO"):
        model = vlm.load(GOLDEN.parent / name)
    assert f"{name} has no temperature: its logits are cosines" in caplog.text
    classify = vlm.ZeroShotClassifier(model, TEXTS)
    best = classify(golden[0]).logits.argmax(axis=1)
    assert classify.calibrate(golden[0], [TEXTS[i] for i in best]).temperature < 1


def test_unreadable_images_are_skipped(blip2, golden):
    images, logits = golden
    classify = vlm.ZeroShotClassifier(blip2, {text: [text] for text in TEXTS})
    seen = []
    found = classify([b"no image", images[1]], on_error=lambda at, error: seen.append(at))
    assert seen == [0]
    assert np.abs(found.logits - logits[1:2]).max() < 5e-6
    assert classify([b"no image"], on_error=lambda at, error: None).logits.shape == (0, 3)


def test_one_vector_of_an_image_is_refused(blip2, golden, tmp_path):
    image = golden[0][0]
    pixels = blip2.preprocess.collate([blip2.preprocess.pixels(blip2.preprocess.open(image))])
    for use in (
        lambda: blip2.encode_image(image),
        lambda: blip2.encode_pixels(pixels),
        lambda: vlm.RetrievalIndex(blip2).add([image]),
        lambda: vlm.explain(blip2, image, "a cat"),
        lambda: vlm.heads.FewShotClassifier.fit(blip2, [image, image], ["a", "b"]),
    ):
        with pytest.raises(ConfigError, match="makes 5 vectors of an image, and this takes one"):
            use()
    with pytest.raises(ConfigError, match="vectors of an image, and an exported program one"):
        vlm.exporting.export(blip2, tmp_path / "program", tower="vision")
    with pytest.raises(CheckpointError, match=r"no place for vision\.pool 'qformer'"):
        blip2.save(tmp_path / "back", format="huggingface")
    with pytest.raises(ConfigError, match="vectors of an image, and the losses take one"):
        vlm.Experiment(name="x", model=blip2.config)


def test_evaluations_take_the_largest_cosine(blip2, golden):
    """Ranks and choices follow from transformers' scores, which are cosines: there is no scale."""
    images, scores = golden
    own, best = scores[np.arange(3), np.arange(3)], scores.argmax(axis=1)
    data = vlm.DataInfo("noise")
    tasks = [
        vlm.ZeroShotTask(images, TEXTS, [0, 1, 2], data),
        vlm.RetrievalTask(images, TEXTS, data),
        vlm.SelectionTask([images], [TEXTS], data),
        vlm.evaluation.MultilabelTask(images, TEXTS, np.eye(3, dtype=bool), data),
    ]
    zero_shot, retrieval, selection, multilabel = vlm.evaluation.evaluate(blip2, tasks).results
    by_image = (scores > own[:, None]).sum(axis=1)
    by_text = (scores > own[None, :]).sum(axis=0)
    assert len({*by_image, *by_text}) > 1
    assert zero_shot.samples["rank"].tolist() == by_image.tolist()
    assert zero_shot.samples["predicted"].tolist() == best.tolist()
    assert retrieval.samples["rank"].tolist() == [*by_image, *by_text]
    assert retrieval.samples["found"].tolist() == [*best, *scores.argmax(axis=0)]
    found = [*scores.max(axis=1), *scores.max(axis=0)]
    assert np.abs(retrieval.samples["score"] - found).max() < 5e-6
    assert selection.metrics["text_acc"].value == float((by_image == 0).all())
    assert selection.metrics["image_acc"].value == float((by_text == 0).all())
    precision = (1 / (1 + by_text)).mean()  # of the one right image of each text
    assert multilabel.metrics["mean_average_precision"].value == pytest.approx(precision)
    again = vlm.evaluation.evaluate(DistributedModel(blip2), tasks[:2])
    assert again["retrieval"].metrics == retrieval.metrics


def test_wrapped_models_keep_the_vectors(blip2, golden):
    images, logits = golden
    classify = vlm.ZeroShotClassifier(DistributedModel(blip2), {text: [text] for text in TEXTS})
    assert np.abs(classify(images).logits - logits).max() < 5e-6


def test_bundles_keep_the_vectors(blip2, golden, tmp_path):
    assert "embedding 5 x 16" in repr(blip2)
    blip2.save(tmp_path / "bundle")
    again = vlm.load(tmp_path / "bundle")
    ours, theirs = (np.asarray(vlm.heads.image_tokens(m, golden[0])) for m in (blip2, again))
    assert np.array_equal(ours, theirs)
    larger = vlm.load(GOLDEN, image_size=40)
    assert np.asarray(vlm.heads.image_tokens(larger, golden[0])).shape == ours.shape


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (None, {"architectures": ["Blip2ForConditionalGeneration"]}, "vlm reads Blip2ForImageText"),
        ("vision_config", {"qkv_bias": False}, "qkv_bias is False: vlm supports True"),
        ("qformer_config", {"use_qformer_text_input": False}, "use_qformer_text_input is False"),
        ("qformer_config", {"hidden_act": "relu"}, "qformer_config.hidden_act is 'relu': vlm supp"),
        ("qformer_config", {"cross_attention_frequency": 1}, r"missing.*layer\.1\.crossattention"),
        ("qformer_config", {"num_attention_heads": 5}, "width 24 is not a multiple of heads 5"),
        ("qformer_config", {"vocab_size": 200}, "tokenizer has .* tokens and its embedding table"),
        (None, {"num_query_tokens": 6}, "of another shape: query_tokens"),
    ],
)
def test_configs_that_differ_are_refused_by_name(part, changes, message, tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "blip2")
    values = json.loads((folder / "config.json").read_text())
    (values[part] if part else values).update(changes)
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        vlm.load(folder)


def test_a_pool_without_its_q_former_is_refused():
    with pytest.raises(ConfigError, match="a Q-Former needs both"):
        vlm.ViTConfig(projection="linear", pool="qformer")
    with pytest.raises(ConfigError, match="a Q-Former needs both"):
        vlm.ViTConfig(projection="linear", qformer=QFormerConfig())
    with pytest.raises(ConfigError, match='"qformer" needs a projection'):
        vlm.ViTConfig(pool="qformer", qformer=QFormerConfig())
