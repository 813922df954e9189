"""Adapters from `peft` compute what they did there, and ours open there."""

import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vlm import adaptation
from vlm.bundle import load
from vlm.config import AdapterConfig
from vlm.errors import CheckpointError, ConfigError
from vlm.models import adapters
from vlm.nn.lora import AdapterParam
from vlm.weights.files import SafetensorsFile, write_safetensors

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = sorted(path.name for path in GOLDEN.glob("peft_*"))


def base_of(name: str) -> pathlib.Path:
    return GOLDEN / ("hf_siglip" if "siglip" in name else "hf_clip")


def embeddings(bundle, golden):
    graph, state = nnx.split(bundle.model)
    both = embed(graph, state, jnp.asarray(golden["pixels"]), jnp.asarray(golden["tokens"]))
    return np.concatenate([np.asarray(z) for z in both])


@functools.partial(jax.jit, static_argnums=0)
def embed(graph, state, pixels, tokens):
    model = nnx.merge(graph, state)
    return model.encode_image(pixels), model.encode_text(tokens)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_computes_what_it_did_there(name, tmp_path):
    base, golden = base_of(name), np.load(base_of(name) / "outputs.npz")
    wanted = np.load(GOLDEN / name / "adapted.npz")
    wanted = np.concatenate([wanted["z_image"], wanted["z_text"]])
    bundle = load(GOLDEN / name, base=base)
    before = np.concatenate([golden["z_image"], golden["z_text"]])
    before /= np.linalg.norm(before, axis=1, keepdims=True)
    assert np.abs(before - wanted).max() > 0.01
    assert np.abs(embeddings(bundle, golden) - wanted).max() < 1e-5
    assert bundle.name == name

    adaptation.save_peft(bundle, tmp_path / "again")
    theirs, ours = (
        SafetensorsFile(folder / "adapter_model.safetensors")
        for folder in (GOLDEN / name, tmp_path / "again")
    )
    assert ours.shapes == theirs.shapes
    for key in ours.shapes:
        assert np.array_equal(ours.read(key), theirs.read(key)), key
    again = load(tmp_path / "again", base=base)
    assert np.array_equal(embeddings(again, golden), embeddings(bundle, golden))


@pytest.fixture(scope="module")
def clip():
    return load(GOLDEN / "hf_clip")


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GOLDEN / "peft_clip", tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "is of type 'IA3': vlm reads only LORA, and DoRA"),
        ({"modules_to_save": ["text_projection"]}, r"has modules_to_save \['text_projection'\]"),
        ({"bias": "all"}, "has bias 'all', which vlm does not support: merge the adapter"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"layer_replication": [[0, 2]]}, "has layer_replication"),
        ({"r": 0}, r"adapter_config.json: r is 0"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x', not a number"),
        ({"alpha_pattern": {"(": 2}}, r"alpha_pattern has '\(', which is no pattern"),
    ],
)
def test_what_is_not_supported_is_named(clip, folder, fields, message):
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    with pytest.raises(CheckpointError, match=message):
        adaptation.attach(clip, folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf_siglip", "which have no place in the model: give the base that it was trained on"),
        ("oc_vitamin", "transformers has no place for a vision tower of the kind 'vitamin'"),
    ],
)
def test_another_model_is_refused(folder, name, message):
    with pytest.raises(CheckpointError, match=message):
        load(folder, base=GOLDEN / name)


def test_tensors_that_do_not_fit_are_named(clip, folder):
    file = folder / "adapter_model.safetensors"
    tensors = SafetensorsFile(file)
    arrays = {key: tensors.read(key) for key in tensors.shapes}
    first = "base_model.model.text_projection.lora_A.weight"
    write_safetensors(file, (arrays | {first: arrays[first][:, :-1].copy()}).items(), {})
    with pytest.raises(
        CheckpointError, match=r"for text.projection matrices of .* and the model t"
    ):
        load(folder, base=GOLDEN / "hf_clip")
    del arrays[first]
    write_safetensors(file, arrays.items(), {})
    with pytest.raises(CheckpointError, match=r"for text.projection matrices of"):
        adaptation.attach(clip, folder)


def test_an_adapter_that_names_no_model(folder):
    config = folder / "adapter_config.json"
    values = json.loads(config.read_text()) | {"base_model_name_or_path": None}
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="does not record its base model: give it"):
        load(folder)


def test_what_has_no_place_there_is_named(tmp_path):
    bundle = load(GOLDEN / "hf_siglip")
    with pytest.raises(ConfigError, match="has no adapter: attach or train one first"):
        adaptation.save_peft(bundle, tmp_path / "out")
    config = AdapterConfig(rank=2, targets=("vision.pool.*",))
    adapter = adapters.fresh(bundle.model, config, jax.random.key(0))
    bundle = bundle.with_adapter(adapter, config)
    with pytest.raises(CheckpointError, match=r"adapter of vision\.pool\.attention\.key, vision"):
        adaptation.save_peft(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.peers
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["hf_clip", "hf_siglip"])
def test_an_adapter_that_was_trained_here_opens_there(name, dora, tmp_path):
    torch, _ = (pytest.importorskip(package) for package in ("torch", "peft"))
    from make_peft import embeddings as their_embeddings
    from make_peft import transformers_model
    from peft import PeftModel

    golden = np.load(GOLDEN / name / "outputs.npz")
    bundle = load(GOLDEN / name)
    config = AdapterConfig(rank=3, alpha=5.0, targets=("*.blocks.*",), dora=dora)
    adapter = adapters.fresh(bundle.model, config, jax.random.key(0))
    graph, trained, rest = nnx.split(adapters.attach(bundle.model, adapter), AdapterParam, ...)
    pixels, tokens = jnp.asarray(golden["pixels"]), jnp.asarray(golden["tokens"])

    @jax.jit
    @jax.grad
    def gradient(trained):
        model = nnx.merge(graph, trained, rest)
        z_image, z_text = model.encode_image(pixels), model.encode_text(tokens)
        return -(z_image * z_text[: len(z_image)]).sum()

    for _ in range(20):
        trained = jax.tree.map(lambda p, g: p - 0.05 * jnp.sign(g), trained, gradient(trained))
    model = nnx.merge(graph, trained, rest)
    ours = bundle.with_adapter(adapters.adapter_of(model), config)
    assert np.abs(embeddings(ours, golden) - embeddings(bundle, golden)).max() > 0.01
    adaptation.save_peft(ours, tmp_path / "adapter")

    theirs = PeftModel.from_pretrained(transformers_model(GOLDEN / name), tmp_path / "adapter")
    with torch.inference_mode():
        z = np.concatenate([z.numpy() for z in their_embeddings(theirs, golden)])
    assert np.abs(embeddings(ours, golden) - z).max() < 1e-5
