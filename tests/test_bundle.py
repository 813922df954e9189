"""The bundle: what goes in comes out the same after saving, whatever the batch and the source."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from vlm import sharding
from vlm.bundle import Bundle, load
from vlm.config import LOSS_SCORES, ModelConfig, PreprocessConfig, TextConfig, ViTConfig
from vlm.errors import CheckpointError, ConfigError, DataError, ShardingError
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import train_bpe
from vlm.models.dual_encoder import DualEncoder
from vlm.weights import files
from vlm.weights.files import Arrays, SafetensorsFile
from vlm.weights.fingerprint import VerifiedTensors, digests, older_fingerprint
from vlm.weights.rules import flat_arrays

CAPTIONS = ["a red circle", "a blue square", "two dogs", "a cat on a mat " * 6]
CONFIG = ModelConfig(
    vision=ViTConfig(image_size=32, patch_size=16, width=24, depth=2, heads=3, mlp_dim=20),
    text=TextConfig(
        vocab_size=280, context_length=40, width=16, depth=3, heads=2, mlp_dim=24,
        causal=True, pool="end", end_id=1, projection="linear",
    ),
    embed_dim=24, loss="sigmoid", init_scale=10.0, init_bias=-10.0,
)  # fmt: skip


def make(config=CONFIG, seed=0):
    tokenizer = train_bpe(CAPTIONS, config.text.vocab_size, config.text.context_length)
    model = DualEncoder(config, rngs=nnx.Rngs(seed))
    preprocess = Preprocess(PreprocessConfig(image_size=config.vision.image_size))
    return Bundle(model, preprocess, tokenizer, "small")


@pytest.fixture(scope="module")
def bundle():
    return make()


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (20 + i, 50 - i, 3)).astype(np.uint8) for i in range(7)]


def test_embeddings_are_those_of_the_model(bundle, images):
    model = bundle.model
    assert np.allclose(
        bundle.encode_image(images),
        model.encode_image(jnp.asarray(bundle.preprocess(images))),
        atol=2e-6,
    )
    # The bundle cuts the padding that a causal tower cannot see; the model runs the whole rows.
    z = model.encode_text(jnp.asarray(bundle.tokenizer(CAPTIONS)))
    assert np.allclose(bundle.encode_text(CAPTIONS), z, atol=2e-6)


def test_a_loss_names_the_rule_of_its_scores(bundle, monkeypatch):
    monkeypatch.setitem(LOSS_SCORES, "mine", "softmax")
    config = dataclasses.replace(CONFIG)
    object.__setattr__(config, "loss", "mine")  # as if `Loss` listed it
    assert bundle.loss == "sigmoid"
    monkeypatch.setattr(bundle.model, "config", config)
    assert bundle.loss == "softmax"


def test_padding_and_batches_are_invisible(bundle, images):
    z = bundle.encode_image(images)
    assert z.dtype == np.float32
    assert z.shape == (7, 24)
    assert np.allclose(np.linalg.norm(z, axis=1), 1, atol=1e-6)
    for batch_size in (1, 3, 4, 100):
        assert np.allclose(bundle.encode_image(images, batch_size=batch_size), z, atol=2e-6)
        texts = bundle.encode_text(CAPTIONS, batch_size=batch_size)
        assert np.allclose(texts, bundle.encode_text(CAPTIONS), atol=2e-6)


def test_every_kind_of_source(bundle, images, tmp_path):
    z = bundle.encode_image(images[:1])
    path = tmp_path / "image.png"
    Image.fromarray(images[0]).save(path)
    for source in (images[0], Image.fromarray(images[0]), path, str(path), path.read_bytes()):
        assert np.array_equal(bundle.encode_image(source), z)
        assert np.array_equal(bundle.encode_image(iter([source])), z)
    stack = np.stack([images[0], images[0]])
    assert np.allclose(bundle.encode_image(stack), np.concatenate([z, z]), atol=2e-6)
    text = bundle.encode_text("two dogs")
    assert np.array_equal(bundle.encode_text(t for t in ["two dogs"]), text)


def test_no_images_and_no_texts(bundle):
    assert bundle.encode_image([]).shape == (0, 24)
    assert bundle.encode_text([]).shape == (0, 24)


def test_a_stream_is_read_as_it_is_needed(bundle, images):
    """An endless stream fails at its first bad image, so it was not read to its end first."""
    drawn = 0

    def endless():
        nonlocal drawn
        for i in itertools.count():
            drawn += 1
            yield images[0] if i != 9 else "no-such-file.png"

    with pytest.raises(DataError, match=r"no-such-file\.png"):
        bundle.encode_image(endless(), batch_size=2)
    assert drawn < 16


def test_saved_and_loaded_is_the_same_bundle(bundle, images, tmp_path):
    for folder in (tmp_path / "b", tmp_path / "run" / "bundle"):
        bundle.save(folder)
        bundle.save(folder)  # again, over the first
        assert sorted(p.name for p in folder.iterdir()) == [
            "bundle.json", "model.safetensors", "tokenizer.json",
        ]  # fmt: skip
        assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    for path in (tmp_path / "b", tmp_path / "run"):
        again = load(path)
        assert again.config == bundle.config
        assert again.preprocess.config == bundle.preprocess.config
        assert again.tokenizer.config == bundle.tokenizer.config
        assert (again.name, again.fingerprint) == ("small", bundle.fingerprint)
        assert again.loss == "sigmoid"
        assert again.logit_scale == pytest.approx(10.0)
        assert again.logit_bias == -10.0
        assert np.array_equal(again.encode_image(images), bundle.encode_image(images))
        assert np.array_equal(again.encode_text(CAPTIONS), bundle.encode_text(CAPTIONS))
    assert make(seed=1).fingerprint is None
    make(seed=1).save(tmp_path / "other")
    assert load(tmp_path / "other").fingerprint != bundle.fingerprint


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_weights_that_are_not_the_bundles_own(bundle, tmp_path):
    """A flipped bit anywhere, and another model's file, are noticed by what reads them."""
    bundle.save(tmp_path / "b")
    weights = tmp_path / "b" / "model.safetensors"
    whole = weights.read_bytes()
    where = SafetensorsFile(weights)._entries
    for name, entry in list(where.items())[::5]:
        flip(weights, entry.offset + entry.size // 2)
        with pytest.raises(CheckpointError, match=f"{name} in .* is not what was saved"):
            load(tmp_path / "b")
        weights.write_bytes(whole)
    # The text tower alone does not read what is damaged in the other.
    flip(weights, where["vision.stem.kernel"].offset)
    z = load(tmp_path / "b", tower="text").encode_text(["a"])
    assert np.array_equal(z, bundle.encode_text(["a"]))
    make(seed=1).save(tmp_path / "other")
    weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="damaged, or of another model than"):
        load(tmp_path / "b")


def test_each_host_checks_what_it_reads(tmp_path, monkeypatch):
    """Rows of a table, cut anywhere, are checked in the parts that they lie in."""
    monkeypatch.setattr(files, "_PART", 12)
    table = np.arange(50, dtype=np.float32).reshape(10, 5)
    found = {"a": digests("a", table)}
    assert len(found["a"]) == 5
    checked = VerifiedTensors(Arrays({"a": table}, "here"), found)
    for start, stop in ((0, 10), (0, 1), (3, 4), (3, 9), (7, 7), (9, 10)):
        assert np.array_equal(checked.read("a", start, stop), table[start:stop])
    table[4, 2] += 1
    assert np.array_equal(checked.read("a", 6, 10), table[6:])
    for start, stop in ((0, 10), (4, 5), (5, 6), (3, 9)):
        with pytest.raises(CheckpointError, match="a in here is not what was saved"):
            checked.read("a", start, stop)


def test_a_bundle_from_before_there_were_digests(bundle, images, tmp_path):
    bundle.save(tmp_path / "b")
    about = json.loads((tmp_path / "b" / "bundle.json").read_text())
    weights = tmp_path / "b" / "model.safetensors"
    del about["digests"]
    (tmp_path / "b" / "bundle.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="safetensors is not what was saved"):
        load(tmp_path / "b")
    about["fingerprint"] = older_fingerprint(SafetensorsFile(weights))
    (tmp_path / "b" / "bundle.json").write_text(json.dumps(about))
    assert np.array_equal(load(tmp_path / "b").encode_image(images), bundle.encode_image(images))
    about["digests"] = {"vision.stem.kernel": ["0" * 32]}
    (tmp_path / "b" / "bundle.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=r"not as saved .*not those of its"):
        load(tmp_path / "b")


def test_weights_open_with_the_safetensors_library(bundle, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    bundle.save(tmp_path / "b")
    tensors = safetensors.load_file(tmp_path / "b" / "model.safetensors")
    assert np.array_equal(tensors["text.embedding"], bundle.model.text.embedding[...])


def test_bfloat16_halves_the_parameters_and_stays_close(bundle, images, tmp_path):
    bundle.save(tmp_path / "b")
    half = load(tmp_path / "b", dtype="bfloat16")
    leaves = jax.tree.leaves(nnx.state(half.model))
    assert {str(leaf.dtype) for leaf in leaves} == {"bfloat16", "float32"}
    assert half.model.logit_scale.dtype == np.float32
    cosine = (half.encode_image(images) * bundle.encode_image(images)).sum(1)
    assert cosine.min() > 0.999


@pytest.mark.parametrize(
    ("sizes", "axes"),
    [
        ((2, 2), ("data", "fsdp")),
        ((2, 4), ("tensor", "fsdp")),  # any order, and axes left out
        ((2, 2, 2), ("data", "fsdp", "tensor")),
    ],
)
def test_a_mesh_holds_the_parameters_in_parts(bundle, images, tmp_path, monkeypatch, sizes, axes):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 1)
    bundle.save(tmp_path / "b")
    mesh = jax.make_mesh(sizes, axes)
    spread = load(tmp_path / "b", mesh=mesh)
    assert np.allclose(spread.encode_image(images), bundle.encode_image(images), atol=2e-6)
    assert np.allclose(spread.encode_text(CAPTIONS), bundle.encode_text(CAPTIONS), atol=2e-6)
    whole = dict(flat_arrays(bundle.model))
    for name, array in flat_arrays(spread.model):
        assert np.array_equal(array, whole[name])
        wanted = sharding.parameter_spec(tuple(name.split(".")), array.shape, array.sharding.mesh)
        assert array.sharding.spec == wanted
    ways = mesh.shape["fsdp"] * mesh.shape.get("tensor", 1)
    kernel = spread.model.text.transformer.blocks.mlp.up.kernel[...]
    assert kernel.addressable_shards[0].data.size == kernel.size // ways
    assert load(tmp_path / "b", mesh=mesh, image_size=64).model.vision.position.shape == (16, 24)
    # Written from a mesh, it is the same bundle.
    spread.save(tmp_path / "again")
    assert spread.fingerprint == bundle.fingerprint


def test_a_mesh_of_other_axes(bundle, tmp_path):
    bundle.save(tmp_path / "b")
    with pytest.raises(ShardingError, match=r"an axis 'model'.*data, fsdp, tensor"):
        load(tmp_path / "b", mesh=jax.make_mesh((1,), ("model",)))


@pytest.mark.parametrize("backend", ["tensor", "tensorflow"])
def test_images_are_resized_by_the_code_that_is_asked_for(bundle, images, tmp_path, backend):
    bundle.save(tmp_path / "b")
    other = load(tmp_path / "b", resize_backend=backend)
    kernel = {"tensor": "bicubic", "tensorflow": "bilinear"}[backend]
    assert other.preprocess.config == dataclasses.replace(
        bundle.preprocess.config, backend=backend, kernel=kernel, antialias=backend == "tensor"
    )
    by_hand = Bundle(bundle.model, Preprocess(other.preprocess.config), bundle.tokenizer, "x")
    assert np.array_equal(other.encode_image(images), by_hand.encode_image(images))
    assert not np.array_equal(other.encode_image(images), bundle.encode_image(images))
    other.save(tmp_path / "again")
    assert load(tmp_path / "again").preprocess.config == other.preprocess.config
    same = load(tmp_path / "again", resize_backend=backend).preprocess.config
    assert same == other.preprocess.config


@pytest.mark.untyped
def test_a_code_to_resize_by_that_does_not_fit(bundle, tmp_path):
    padded = PreprocessConfig(image_size=32, resize="pad")
    Bundle(bundle.model, Preprocess(padded), bundle.tokenizer, "x").save(tmp_path / "b")
    with pytest.raises(
        ConfigError, match="resize_backend is 'torch': choose one of 'pillow', 'tensor'"
    ):
        load(tmp_path / "b", resize_backend="torch")
    with pytest.raises(ConfigError, match=r'resize "pad" needs the backend "pillow"'):
        load(tmp_path / "b", resize_backend="tensor")


def test_shows_itself_in_a_line(bundle):
    assert repr(bundle).startswith("Bundle(small: ")
    assert "<caption>small</caption>" in bundle._repr_html_()


# ------------------------------------------------------------------------------ bad input


def test_parts_that_contradict_each_other(bundle):
    words = " ".join(f"word{i}" for i in range(100))
    with pytest.raises(ConfigError, match="300 tokens and the model's embedding table has 280"):
        Bundle(bundle.model, bundle.preprocess, train_bpe([words] * 2, 300, 40), "x")
    with pytest.raises(
        ConfigError, match="context_length is 41 in the tokenizer and 40 in the model"
    ):
        Bundle(bundle.model, bundle.preprocess, train_bpe(CAPTIONS, 280, 41), "x")
    with pytest.raises(ConfigError, match="image_size is 33 in the preprocessing"):
        Bundle(bundle.model, Preprocess(PreprocessConfig(image_size=33)), bundle.tokenizer, "x")


@pytest.mark.parametrize("batch_size", [0, -3])
def test_batch_size_must_hold_something(bundle, images, batch_size):
    with pytest.raises(ConfigError, match=str(batch_size)):
        bundle.encode_image(images, batch_size=batch_size)


@pytest.mark.untyped
def test_things_that_are_no_images_or_texts(bundle):
    with pytest.raises(DataError, match="int"):
        bundle.encode_image(3)
    with pytest.raises(DataError, match="image 1 is an array of float64"):
        bundle.encode_image([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3))])
    with pytest.raises(DataError, match="text 1 is 7"):
        bundle.encode_text(["a", 7])


def test_places_without_a_model(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"web address.*its Hub id: 'google/siglip'"):
        load("https://huggingface.co/google/siglip")
    with pytest.raises(CheckpointError, match=r"web address.*path of the file$"):
        load("https://example.org/model.npz")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="vlm train --resume"):
        load(tmp_path / "run")
    # A run's config.json, or what is left of one, is not taken for a public model's.
    for text in ('{"name": "shapes", "model": {}}', '{"name": '):
        (tmp_path / "run" / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"has no bundle yet.*vlm train --resume"):
            load(tmp_path / "run")
    with pytest.raises(ConfigError, match="float12"):
        load(tmp_path, dtype="float12")


def test_truncated_bundles(bundle, tmp_path):
    bundle.save(tmp_path / "b")
    weights, about = tmp_path / "b" / "model.safetensors", tmp_path / "b" / "bundle.json"
    whole, text = weights.read_bytes(), about.read_text()

    for size in (0, 5, 200, len(whole) - 1):
        weights.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"truncated|damaged"):
            load(tmp_path / "b")
    weights.write_bytes(b"<!DOCTYPE html><html>" * 30)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(tmp_path / "b")
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"there is no .*model\.safetensors"):
        load(tmp_path / "b")
    weights.write_bytes(whole)

    about.write_text(text[:40])
    with pytest.raises(CheckpointError, match=r"bundle\.json is not JSON"):
        load(tmp_path / "b")
    values = json.loads(text)
    about.write_text(json.dumps(values | {"format": 99}))
    with pytest.raises(CheckpointError, match="update vlm"):
        load(tmp_path / "b")
    about.write_text(text)
    (tmp_path / "b" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="incomplete"):
        load(tmp_path / "b")


def test_another_architecture_lists_all_that_differs(bundle, tmp_path):
    bundle.save(tmp_path / "b")
    about = tmp_path / "b" / "bundle.json"
    values = json.loads(about.read_text())
    values["model"]["text"]["mlp_dim"] = 25
    values["model"]["vision"]["pre_norm"] = True
    values["model"]["init_bias"] = None
    about.write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "b")
    message = str(caught.value)
    assert "2 parameters missing from the file: vision.pre_norm" in message
    assert "1 parameter in the file without a place in the model: logit_bias" in message
    assert (
        "text.transformer.blocks.mlp.up.kernel (3, 16, 24) (the model has (3, 16, 25))" in message
    )


@pytest.mark.untyped
def test_images_are_decoded_as_asked(bundle, tmp_path):
    """A transparent image: on white as intended, without its alpha channel as the reference."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 4), np.uint8)
    bundle.save(tmp_path / "b")
    other = load(tmp_path / "b", decode="reference")
    opaque = pixels[..., :3]
    np.testing.assert_array_equal(other.encode_image(pixels), bundle.encode_image(opaque))
    assert not np.allclose(other.encode_image(pixels), bundle.encode_image(pixels), atol=1e-3)
    other.save(tmp_path / "again")
    assert load(tmp_path / "again").preprocess.config.decode == "reference"
    assert load(tmp_path / "again", decode="intended").preprocess.config == bundle.preprocess.config
    with pytest.raises(ConfigError, match="decode"):
        load(tmp_path / "b", decode="pil")
