"""Bundles and heads in other processes: pickled after use, and copied."""

import concurrent.futures
import copy
import multiprocessing
import pickle

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from PIL import Image

import vlm
from vlm.config import AdapterConfig, MeshConfig
from vlm.heads import FewShotClassifier, NeighbourClassifier
from vlm.inputs import Preprocess, train_bpe
from vlm.models import DualEncoder, adapters
from vlm.sharding import make_mesh

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 70, 220)}
PICTURES = [Image.new("RGB", (24, 24), colour) for colour in COLOURS.values()]
TEXTS = ["a red square", "a blue stripe"]


def bundle(seed=0):
    experiment = vlm.load_config(tiny.folder() / "shapes.py")
    model = DualEncoder(experiment.model, rngs=nnx.Rngs(seed))
    tokenizer = train_bpe([*TEXTS, "a green square"], 280, 12)
    return vlm.Bundle(model, Preprocess(experiment.preprocess), tokenizer, "tiny")


def sent(thing):
    return pickle.loads(pickle.dumps(thing))


def adapted():
    config = AdapterConfig(rank=2, quantize="int8")
    model = bundle()
    return model.with_adapter(adapters.fresh(model.model, config, jax.random.key(0)), config)


def equal(one, other):
    np.testing.assert_array_equal(one.encode_image(PICTURES), other.encode_image(PICTURES))
    np.testing.assert_array_equal(one.encode_text(TEXTS), other.encode_text(TEXTS))


@pytest.mark.parametrize("way", [sent, copy.deepcopy])
@pytest.mark.parametrize("make", [bundle, adapted])
def test_a_used_bundle_is_copied(make, way):
    model = make()
    model.encode_image(PICTURES), model.encode_text(TEXTS), model.logit_scale
    other = way(model)
    equal(model, other)
    assert (other.name, other.logit_scale, other.adapter, other.identity) == (
        model.name,
        model.logit_scale,
        model.adapter,
        model.identity,
    )
    assert other.model is not model.model


def test_a_copy_has_parameters_of_its_own():
    model = bundle()
    other = copy.deepcopy(model)
    before = model.encode_text(TEXTS)
    other.model.text.projection.kernel[...] *= 2
    np.testing.assert_array_equal(model.encode_text(TEXTS), before)


def test_a_pickled_bundle_has_no_mesh(tmp_path):
    """On the device of another process; a deep copy stays on the mesh."""
    bundle().save(tmp_path / "m")
    model = vlm.load(tmp_path / "m", mesh=make_mesh(MeshConfig(data=4, tensor=2)))
    z = model.encode_image(PICTURES)
    kernel = copy.deepcopy(model).model.text.transformer.blocks.mlp.up.kernel[...]
    assert kernel.sharding == model.model.text.transformer.blocks.mlp.up.kernel[...].sharding
    other = sent(model)
    assert len(other.model.text.transformer.blocks.mlp.up.kernel[...].devices()) == 1
    np.testing.assert_allclose(other.encode_image(PICTURES), z, atol=1e-6)
    equal(other, vlm.load(tmp_path / "m"))


def test_half_a_bundle_is_sent(tmp_path):
    bundle().save(tmp_path / "m")
    model = vlm.load(tmp_path / "m", tower="text")
    np.testing.assert_array_equal(sent(model).encode_text(TEXTS), model.encode_text(TEXTS))


def few_shot(model):
    return FewShotClassifier.fit(model, PICTURES * 4, list(COLOURS) * 4)


def heads():
    model = bundle()
    index = vlm.RetrievalIndex(model)
    index.add(PICTURES, ids=list(COLOURS), metadata={"label": list(COLOURS)})
    prompt = vlm.adaptation.learn_prompt(model, PICTURES, list(COLOURS), n_ctx=2, steps=1)
    return {
        "zero_shot": vlm.ZeroShotClassifier(model, list(COLOURS)),
        "few_shot": few_shot(model),
        "neighbours": NeighbourClassifier(index, "label", k=1),
        "prompted": prompt,
    }


@pytest.mark.slow
@pytest.mark.parametrize("way", [sent, copy.deepcopy])
def test_classifiers_are_copied(way):
    for name, head in heads().items():
        found, wanted = way(head)(PICTURES), head(PICTURES)
        np.testing.assert_array_equal(found.logits, wanted.logits, err_msg=name)
        assert found.labels == wanted.labels


@pytest.mark.parametrize("way", [sent, copy.deepcopy])
@pytest.mark.parametrize("coding", [None, "int8"])
def test_an_index_is_copied(way, coding, tmp_path):
    index = vlm.RetrievalIndex(bundle(), coding=coding)
    index.add(PICTURES, ids=list(COLOURS), metadata={"year": [1, 2, 3]})
    index.save(tmp_path / "index")
    loaded = vlm.RetrievalIndex.load(tmp_path / "index", index.model)  # memory-mapped
    loaded.place(make_mesh(MeshConfig(data=-1)))
    wanted = loaded.search("a red square", k=2)
    for one in (index, loaded):
        other = way(one)
        assert [hit.id for hit in other.search("a red square", k=2)] == [hit.id for hit in wanted]
        other.add(["a text"], ids=["text"], metadata={"year": [4]})
        assert len(other) == 4
        assert len(one) == 3


def embed(model, pictures):
    return model.encode_image(pictures), jax.device_count()


@pytest.mark.slow
@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_processes_share_the_work(start, monkeypatch):
    """A bundle that was used goes to processes that are spawned, with one device each."""
    model = bundle()
    z = model.encode_image(PICTURES)
    flags = [flag for flag in os_flags() if "device_count" not in flag]
    monkeypatch.setenv("XLA_FLAGS", " ".join(flags))
    context = multiprocessing.get_context(start)
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        parts = list(pool.map(embed, [model] * 2, [PICTURES, PICTURES]))
    for part, devices in parts:
        assert devices == 1
        np.testing.assert_array_equal(part, z)


FORKS = """
import multiprocessing, pickle, sys, warnings
sys.path[:0] = sys.argv[2:]
warnings.simplefilter("ignore")
import test_pickle
from concurrent.futures import ProcessPoolExecutor

def refusal(model, data=None):
    try:
        (model or pickle.loads(data)).encode_text(["a red square"])
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def first(seed):
    return test_pickle.bundle(seed).encode_text(["a red square"])

fork = multiprocessing.get_context("fork")
if sys.argv[1] == "before":  # JAX runs in the children alone
    with ProcessPoolExecutor(2, mp_context=fork) as pool:
        one, two = pool.map(first, [0, 0])
    assert (one == first(0)).all() and (two == one).all()
else:
    model = test_pickle.bundle()
    data = pickle.dumps(model)
    queue = fork.Queue()
    for arguments in ((model,), (None, data)):
        child = fork.Process(target=lambda: queue.put(refusal(*arguments)))
        child.start()
        print(queue.get(timeout=60))
        child.join()
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_fork_works_before_jax_runs_and_is_refused_after(when):
    """Rather than to hang: a fork lacks JAX's threads. Processes of their own, as forks warn."""
    import os
    import subprocess
    import sys

    paths = [os.path.dirname(__file__), *sys.path]
    flags = " ".join(flag for flag in os_flags() if "device_count" not in flag)
    done = subprocess.run(
        [sys.executable, "-c", FORKS, when, *paths],
        capture_output=True, text=True, timeout=200, env=os.environ | {"XLA_FLAGS": flags},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = "ConfigError: this process was forked from one that has a model"
    assert done.stdout.count(expected) == (2 if when == "after" else 0), done.stdout


def os_flags():
    import os

    return os.environ["XLA_FLAGS"].split()
