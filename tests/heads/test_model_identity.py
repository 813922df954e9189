"""Identity of a model in a saved head, and which models match it."""

import dataclasses
import json
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

import vlm
from vlm.errors import CheckpointError
from vlm.evaluation.evidence import model_facts
from vlm.heads import prompts
from vlm.heads.model_identity import (
    PROBE_IMAGE,
    PROBE_TEXT,
    check_identity,
    embedding_facts,
    identity,
    mismatch,
    stored_facts,
)
from vlm.heads.retrieval import RetrievalIndex
from vlm.inputs.preprocess import Preprocess


class Model:
    """Model whose probe embeddings have these cosines with those of `Model()`."""

    name, loss, logit_scale, logit_bias = "plain", "softmax", 10.0, 0.0

    def __init__(self, text=1.0, image=1.0, fingerprint=None):
        self.text, self.image, self.fingerprint = text, image, fingerprint

    def encode_text(self, texts):
        return self._at(self.text, len(texts))

    def encode_image(self, images):
        return self._at(self.image, len(images))

    def _at(self, cosine, count):
        return np.tile(np.array([cosine, np.sqrt(1 - cosine**2)], np.float32), (count, 1))


def test_the_probes_never_change():
    """Saved heads store embeddings of these probes: new probes would invalidate all of them."""
    assert PROBE_TEXT == "a photo of a red car in the snow"
    assert PROBE_IMAGE.shape == (64, 64, 3)
    assert zlib.crc32(PROBE_IMAGE.tobytes()) == 3985674480


@pytest.mark.parametrize(
    ("other", "fits"),
    [
        (Model(), True),
        (Model(text=0.9995, image=0.9995), True),  # another machine or precision
        (Model(text=0.998), False),
        (Model(image=0.998), False),
        (Model(image=0.998, fingerprint="of another file"), False),
        (Model(image=0.998, fingerprint="of its file"), True),  # equal files: no image is embedded
        (Model(text=0.998, fingerprint="of its file"), False),
    ],
)
def test_a_model_is_identified_by_its_probe_embeddings(other, fits):
    kept = identity(Model(fingerprint="of its file"))
    if fits:
        check_identity(kept, other, Path("here"))
    else:
        with pytest.raises(CheckpointError, match=r"here was built by .* embeds differently"):
            check_identity(kept, other, Path("here"))


# --------------------------------------------------------------- embedding facts


@pytest.fixture(scope="module")
def bundle():
    return vlm.load(tiny.run())


LABELS = [f"a {word} thing" for word in ("red", "green", "blue", "odd", "dull")]


def test_a_model_of_another_type_does_not_get_cached_embeddings(bundle, tmp_path, monkeypatch):
    """Nor does one with other tokenizer rules; an equal model does."""
    monkeypatch.setenv("VLM_CACHE", str(tmp_path))
    monkeypatch.setattr(prompts, "CACHED", 5)
    half = vlm.load(tiny.run(), dtype="bfloat16")
    assert half.fingerprint == bundle.fingerprint
    lower = vlm.load(tiny.run())
    rules = dataclasses.replace(
        lower.tokenizer.config, lowercase=not lower.tokenizer.config.lowercase
    )
    lower.tokenizer = lower.tokenizer.with_rules(rules)
    labels, templates = [label.title() for label in LABELS], ["a photo of a {}."]
    for count, model in enumerate((half, bundle, lower), 1):
        made = vlm.ZeroShotClassifier(model, labels, templates)
        sentences = [f"a photo of a {label}." for label in labels]
        np.testing.assert_allclose(made.z_labels, model.encode_text(sentences), atol=1e-6)
        assert len(list((tmp_path / "classifiers").iterdir())) == count
    vlm.ZeroShotClassifier(vlm.load(tiny.run()), labels, templates)
    assert len(list((tmp_path / "classifiers").iterdir())) == 3


def test_every_change_of_an_embedding_changes_a_fact(bundle):
    base = embedding_facts(bundle)

    def changed(other, *names):
        now = embedding_facts(other)
        assert {n for n in now.keys() | base.keys() if now.get(n) != base.get(n)} == set(names)

    changed(vlm.load(tiny.run()))
    changed(vlm.load(tiny.run(), dtype="bfloat16"), "dtype")
    changed(vlm.load(tiny.run(), context_length=8), "config", "tokenizer")
    changed(vlm.load(tiny.run(), image_size=24), "config", "preprocess")
    other = vlm.load(tiny.run())
    config = dataclasses.replace(other.preprocess.config, resize="pad")
    other.preprocess = Preprocess(config)
    changed(other, "preprocess")
    assert embedding_facts(other, "text") == embedding_facts(bundle, "text")
    assert embedding_facts(other, "image") != embedding_facts(bundle, "image")
    with jax.default_matmul_precision("bfloat16"):
        changed(bundle, "matmul_precision")
    stored = stored_facts(bundle)
    assert stored["fingerprint"] == bundle.fingerprint
    assert not {"vlm", "platform", "matmul_precision"} & stored.keys()


def test_weights_without_a_fingerprint_are_hashed(bundle):
    """As those of a public checkpoint: two models of one config are two models."""
    plain = vlm.load(tiny.run())
    plain.fingerprint = None
    assert stored_facts(plain) == stored_facts(bundle)
    assert model_facts(plain)["fingerprint"] == bundle.fingerprint  # of an evaluation, to be reused
    _, state = bundle._split
    other = bundle.with_parameters(jax.tree.map(lambda x: x * 1.001, state))
    assert other.fingerprint is None
    assert stored_facts(other) != stored_facts(bundle)
    assert stored_facts(other).keys() == stored_facts(bundle).keys()


def test_an_index_warns_when_new_embeddings_would_not_match(bundle, tmp_path, caplog):
    index = RetrievalIndex(bundle)
    index.add(["red", "green"])
    index.save(tmp_path)
    assert RetrievalIndex.load(tmp_path, vlm.load(tiny.run())).mismatch is None
    half = RetrievalIndex.load(tmp_path, vlm.load(tiny.run(), dtype="bfloat16"))
    assert half.mismatch == "another dtype"
    assert half.search("red", k=1)[0].id == 0
    assert not caplog.records
    half.add(["blue"])
    assert "embeds with another dtype than the index has" in caplog.text
    _, state = bundle._split
    other = bundle.with_parameters(jax.tree.map(lambda x: x * 1.01, state))
    kept = json.loads((tmp_path / "index.json").read_text())
    check_identity(kept, other, tmp_path)  # near enough for a search
    assert mismatch(kept, other) == "other weights"
    del kept["facts"]  # an index of an older version
    assert mismatch(kept, bundle) is None
    assert mismatch(kept, other) == "other weights"


def test_fields_of_later_versions_do_not_change_the_identity_of_older_embeddings():
    """A stored text of a config lacks the fields that a later version has added."""
    model = vlm.load(tiny.run())
    stored = identity(model)
    now = stored["facts"]
    older = {"tokenizer": f"{model.tokenizer.config}".replace(", truncation_side='right'", "")}
    older["config"] = f"{model.config}".replace(", softcap=None", "")
    assert older["config"] != str(model.config)
    assert mismatch(stored | {"facts": now | older}, model) is None
    other = now["config"].replace("heads=2", "heads=4")
    assert other != now["config"]
    assert mismatch(stored | {"facts": now | {"config": other}}, model) == "another config"
