"""Joined towers and truncated embeddings."""

import dataclasses
import pathlib

import numpy as np
import pytest

import vlm
from vlm.cli import main
from vlm.errors import CheckpointError, ConfigError
from vlm.heads.model_identity import embedding_facts
from vlm.models.flops import encode_flops
from vlm.training.init_from import from_model
from vlm.training.step import Trainer

GOLDEN = pathlib.Path(__file__).parent / "weights" / "golden"
TEXTS = ["a photo of a cat", "two dogs"]
IMAGE = np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3)


def load(name, **options):
    return vlm.load(GOLDEN / name, **options)


def test_each_tower_of_a_joined_model_embeds_as_alone(tmp_path):
    images, texts = load("one_dinov2"), load("st_nomic")
    model = images.with_text(texts)
    assert np.array_equal(model.encode_image(IMAGE), images.encode_image(IMAGE))
    asked = model.encode_text(TEXTS, prompt="search_query")
    assert np.array_equal(asked, texts.encode_text(TEXTS, prompt="search_query"))
    assert model.name == "one_dinov2 with st_nomic"
    model.save(tmp_path / "joined")
    again = vlm.load(tmp_path / "joined")
    assert np.array_equal(again.encode_image(IMAGE), model.encode_image(IMAGE))
    assert np.array_equal(again.with_prompt("search_query").encode_text(TEXTS), asked)
    assert again.prompts == texts.prompts
    classifier = vlm.ZeroShotClassifier(again, ["cat", "dog"])
    assert classifier.logits(again.encode_image(IMAGE)).shape == (1, 2)
    half = vlm.load(tmp_path / "joined", tower="text")
    assert np.array_equal(half.encode_text(TEXTS, prompt="search_query"), asked)


def test_halves_of_dual_encoders_are_joined_too():
    whole = load("hf_jina_v2")
    images, texts = load("hf_jina_v2", tower="vision"), load("hf_jina_v2", tower="text")
    joined = images.with_text(texts)
    assert np.array_equal(joined.encode_text(TEXTS), whole.encode_text(TEXTS))
    assert joined.logit_scale == whole.logit_scale
    assert joined.config == whole.config


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (
            "nomic_vision",
            "st_nomic",
            "nomic_vision embeds images in 16 dimensions and st_nomic",
        ),
        ("st_nomic", "st_nomic", "st_nomic has no vision tower"),
        ("one_dinov2", "one_dinov2", "one_dinov2 has no text tower"),
    ],
)
def test_what_does_not_fit_is_refused(images, texts, message):
    with pytest.raises(ConfigError, match=message):
        load(images).with_text(load(texts))


def test_truncated_embeddings_are_normalised_again(tmp_path, caplog):
    model = load("hf_jina_v2")
    small = model.with_dimensions(8)
    assert "truncated" not in caplog.text  # its files list 8
    for whole, cut in (
        (model.encode_text(TEXTS), small.encode_text(TEXTS)),
        (model.encode_image(IMAGE), small.encode_image(IMAGE)),
    ):
        first = whole[:, :8]
        first = first / np.linalg.norm(first, axis=1, keepdims=True)
        assert np.abs(cut - first).max() < 2e-7
    assert small.embed_dim == small.config.embed_dim == 8
    assert [z.shape[1] for z in vlm.heads.text_tokens(small, TEXTS)] == [8, 8]
    small.save(tmp_path / "small")
    again = vlm.load(tmp_path / "small")
    assert np.array_equal(again.encode_text(TEXTS), small.encode_text(TEXTS))
    back = again.with_dimensions(24)
    assert np.array_equal(back.encode_text(TEXTS), model.encode_text(TEXTS))
    assert back.config == model.config
    with pytest.raises(ConfigError, match="in 8 of 24 dimensions and hf_jina_v1 texts in 24"):
        small.with_text(load("hf_jina_v1"))


def test_a_size_that_the_files_do_not_list_is_warned_of(caplog):
    load("hf_jina_v2").with_dimensions(9)
    assert "truncated to 9 dimensions, and its files list 8, 16, 24 that it was" in caplog.text
    load("hf_jina_v1").with_dimensions(8)
    assert "truncated to 8 dimensions, and its files list no size that it was" in caplog.text
    for wrong in (0, 25):
        with pytest.raises(ConfigError, match=f"dimensions {wrong}: hf_jina_v1 has 24"):
            load("hf_jina_v1").with_dimensions(wrong)


def test_truncated_embeddings_have_no_place_in_other_formats(tmp_path):
    with pytest.raises(vlm.CheckpointError, match="truncated to 8 dimensions: save the model as a"):
        load("hf_clip").with_dimensions(8).save(tmp_path / "x", format="huggingface")


def test_commands_take_a_joined_bundle(tmp_path, capsys):
    out = tmp_path / "joined"
    names = [str(GOLDEN / name) for name in ("one_dinov2", "st_nomic")]
    main(["convert", names[0], str(out), "--text", names[1], "--dimensions", "8"])
    capsys.readouterr()
    model = vlm.load(out)
    assert model.encode_image(IMAGE).shape == model.encode_text("x").shape == (1, 8)


@pytest.fixture(scope="module")
def whole():
    return load("hf_jina_v2")


@pytest.fixture(scope="module")
def small(whole):
    return whole.with_dimensions(8)


IMAGES = [IMAGE, IMAGE[::-1], IMAGE[:, ::-1], 255 - IMAGE]
LABELS = ["cat", "dog", "cat", "dog"]


def test_heads_use_truncated_embeddings(small, whole, tmp_path):
    z_image, z_text = small.encode_image(IMAGES), small.encode_text(["a cat", "a dog"])
    zero_shot = vlm.ZeroShotClassifier(small, ["cat", "dog"], ["a {}"])
    expected = small.logit_scale * z_image @ z_text.T + small.logit_bias
    assert np.abs(zero_shot(IMAGES).logits - expected).max() < 1e-5
    few_shot = vlm.heads.FewShotClassifier.fit(small, IMAGES, LABELS)
    few_shot.save(tmp_path / "few.safetensors")
    assert few_shot.logits(z_image).shape == (4, 2)
    with pytest.raises(CheckpointError, match="8 dimensions"):
        vlm.heads.FewShotClassifier.load(tmp_path / "few.safetensors", whole)
    index = vlm.RetrievalIndex(small)
    index.add(IMAGES, ids=list("abcd"))
    assert index.search("a cat", k=1)[0].id == "abcd"[(z_image @ z_text[0]).argmax()]
    index.save(tmp_path / "index")
    assert vlm.RetrievalIndex.load(tmp_path / "index", small).mismatch is None
    with pytest.raises(CheckpointError, match=r"of 8 dimensions and the model .* makes 24"):
        vlm.RetrievalIndex.load(tmp_path / "index", whole)


@pytest.mark.parametrize("per_image", [False, True])
def test_learned_prompts_are_truncated(per_image, tmp_path):
    small = load("hf_clip").with_dimensions(8)
    options = {"template": "a {}", "per_image": per_image, "steps": 1, "rate": 1e-6}
    learned = vlm.adaptation.learn_prompt(small, IMAGES, LABELS, **options)
    expected = vlm.ZeroShotClassifier(small, ["cat", "dog"], ["a {}"])(IMAGES).logits
    assert learned.z_labels.shape == (2, 8)
    assert np.abs(learned(IMAGES).logits - expected).max() < 1e-3


def test_a_truncated_bundle_is_exported(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    small = load("hf_clip").with_dimensions(8)
    vlm.exporting.export(small, tmp_path / "program", tower="text", format="onnx")
    (file,) = (tmp_path / "program").glob("*.onnx")
    session = onnxruntime.InferenceSession(file)
    (given,) = session.get_inputs()
    z = session.run(None, {given.name: small.tokenizer(TEXTS)})[0]
    assert np.abs(z - small.encode_text(TEXTS)).max() < 1e-5


def test_results_of_the_full_model_are_not_those_of_the_truncated_one(small, whole, tmp_path):
    task = vlm.RetrievalTask(IMAGES, ["a", "b", "c", "d"], vlm.DataInfo("noise"), ks=(1,))
    reports = [vlm.evaluation.evaluate(model, [task]) for model in (whole, small)]
    kinds = [report[task.name].provenance.evidence["fingerprint"] for report in reports]
    assert kinds == [whole.identity, small.identity]
    options = {"licence": "mit", "datasets": ()}
    with pytest.raises(CheckpointError, match="is of another model"):
        small.push_to_hub("me/small", results=reports[0], dry_run=tmp_path / "x", **options)
    small.save(tmp_path / "small")
    again = vlm.load(tmp_path / "small")
    assert again.fingerprint == again.identity == small.identity != whole.identity
    again.push_to_hub("me/small", results=reports[1], dry_run=tmp_path / "y", **options)
    assert again.with_dimensions(24).identity == whole.identity


def test_listed_sizes_do_not_change_stored_embeddings(whole):
    other = whole.with_dimensions(24)
    other.model.config = dataclasses.replace(whole.config, matryoshka=())
    assert embedding_facts(other) == embedding_facts(whole)
    changed = vlm.Experiment(model=whole.config), vlm.Experiment(model=other.config)
    (change,) = vlm.config.resume.changes_between(*changed)
    assert (change.name, change.effect.refused) == ("model.matryoshka", False)


def test_a_truncated_model_does_not_start_a_run_of_narrow_towers(tmp_path):
    base = load("hf_clip").with_dimensions(8)
    base.save(tmp_path / "base")
    experiment = vlm.Experiment(
        init_from=str(tmp_path / "base"), batch_size=2, steps=1,
        preprocess=base.preprocess.config, tokenizer=base.tokenizer.config,
        model=dataclasses.replace(base.config, full_dim=None),
    )  # fmt: skip
    trainer = Trainer(experiment, vlm.sharding.make_mesh(experiment.mesh))
    with pytest.raises(ConfigError, match=r"model\.full_dim is 20 in the model and None in"):
        from_model(trainer, trainer.init(1), base)


def test_flops_of_truncated_towers_are_those_of_the_full_ones():
    whole = load("hf_clip")
    assert encode_flops(whole.with_dimensions(8).config) == encode_flops(whole.config)


def test_video_prompts_are_neither_truncated_nor_given_other_texts():
    model = load("video_xclip")
    with pytest.raises(ConfigError, match="video_xclip cannot be truncated: its vision tower"):
        model.with_dimensions(8)
    with pytest.raises(ConfigError, match="video_xclip cannot be joined with another text tower"):
        model.with_text(model)
