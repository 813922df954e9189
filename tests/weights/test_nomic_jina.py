"""nomic-embed and jina-clip: their outputs, options that are refused, and sizes.

The goldens are made by make_nomic_jina.py; those of jina-clip are compared in test_golden.py too.
"""

import itertools
import json
import logging
import math
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import vlm
from vlm.errors import CheckpointError, ConfigError
from vlm.weights import catalogue, jina_clip, nomic
from vlm.weights.instantiate import abstract_model

GOLDEN = pathlib.Path(__file__).parent / "golden"


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def changed(name, part, changes, tmp_path):
    """A copy of a golden folder with other fields in its config.json; None removes one."""
    folder = shutil.copytree(GOLDEN / name, tmp_path / name)
    values = json.loads((folder / "config.json").read_text())
    place = values
    for key in part:
        place = place[key]
    place.update(changes)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_nomic_vision_embeds_as_published():
    golden = np.load(GOLDEN / "nomic_vision" / "image.npz")
    model = vlm.load(GOLDEN / "nomic_vision")
    z = np.asarray(model.model.encode_image(jnp.asarray(golden["pixels"])))
    assert np.abs(z - unit(golden["z_image"])).max() < 3e-6
    raw = [golden[f"image/{i}"] for i in range(len(z))]
    assert np.abs(model.preprocess(raw) - golden["pixels"]).max() < 1e-6
    with pytest.raises(ConfigError, match=r"no text tower.*Bundle\.with_text"):
        model.encode_text("a cat")


def test_nomic_text_embeds_as_transformers_does(caplog):
    golden = np.load(GOLDEN / "st_nomic" / "text.npz")
    model = vlm.load(GOLDEN / "st_nomic")
    assert model.config.text_transformer.mlp_dim == 256  # n_inner is 37
    texts = golden["texts"].tolist()
    assert np.abs(model.encode_text(texts) - unit(golden["z_text"])).max() < 3e-6
    asked = model.encode_text(texts, prompt="search_query")
    assert np.array_equal(asked, model.encode_text([f"search_query: {text}" for text in texts]))


def test_texts_without_a_required_prompt_are_warned_of_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("vlm.errors.WARNED", set())
    vlm.load(GOLDEN / "st_nomic").save(tmp_path / "bundle")
    model = vlm.load(tmp_path / "bundle")
    for silent in (
        lambda: model.encode_text("a cat", prompt="search_query"),
        lambda: model.encode_text("a cat", prompt=""),
        lambda: model.encode_text(["search_query: a cat", "clustering: a dog"]),
        lambda: model.with_prompt("classification").encode_text("a cat"),
    ):
        silent()
    assert "a prompt" not in caplog.text
    for _ in range(2):
        model.encode_text(["search_query: a cat", "a dog"])
    (warning,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "before each text: choose one of search_query, search_document," in warning.message


def test_nomic_text_without_a_table_of_segments(tmp_path):
    folder = changed("st_nomic", (), {"type_vocab_size": 0}, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (table,) = (name for name in tensors if name.endswith("token_type_embeddings.weight"))
    words = table.replace("token_type", "word")
    tensors[words] = tensors[words] + tensors.pop(table)[:1]
    save_file(tensors, folder / "model.safetensors")
    same = vlm.load(GOLDEN / "st_nomic").encode_text("a cat", prompt="")
    assert np.array_equal(vlm.load(folder).encode_text("a cat", prompt=""), same)


def test_nomic_text_with_the_fields_of_transformers(tmp_path):
    """And without sentence-transformers' files: the pooling is the mean."""
    folder = shutil.copytree(GOLDEN / "st_nomic", tmp_path / "native")
    (folder / "modules.json").unlink()
    old = json.loads((folder / "config.json").read_text())
    names = {theirs: name for name, theirs in nomic._OLD_NAMES.items()}
    sizes = {names[name]: value for name, value in old.items() if name in names}
    more = {"hidden_act": "silu", "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}
    sizes["intermediate_size"] = 256  # which the published code rounds up to
    values = sizes | more | {"model_type": "nomic_bert", "vocab_size": old["vocab_size"]}
    (folder / "config.json").write_text(json.dumps(values))
    texts = ["a photo of a cat", "two dogs"]
    same = vlm.load(GOLDEN / "st_nomic").encode_text(texts)
    assert np.array_equal(vlm.load(folder).encode_text(texts), same)


def test_positions_that_are_scaled_end_where_their_training_did(tmp_path):
    long = {"rotary_scaling_factor": 2, "max_trained_positions": 20, "n_positions": 64}
    folder = changed("st_nomic", (), long, tmp_path)
    assert vlm.load(folder, context_length=20).config.text.context_length == 20
    with pytest.raises(ConfigError, match="positions for 20 tokens"):
        vlm.load(folder, context_length=21)


@pytest.mark.parametrize(
    ("name", "part", "changes", "message"),
    [
        ("st_nomic", (), {"prenorm": True}, "prenorm is True: vlm supports False"),
        ("st_nomic", (), {"moe_every_n_layers": 2}, "moe_every_n_layers is 2"),
        ("st_nomic", (), {"rotary_emb_fraction": 0.5}, "rotary_emb_fraction is 0.5"),
        ("st_nomic", (), {"rotary_emb_fraction": None}, "rotary_emb_fraction is 0.0"),
        ("st_nomic", (), {"activation_function": None}, "activation_function is 'gelu_new'"),
        ("nomic_vision", (), {"activation_function": None}, "activation_function is 'gelu_new'"),
        ("nomic_vision", (), {"prenorm": None}, "prenorm is False"),
        ("st_nomic", (), {"qkv_proj_bias": True}, r"missing from the file: .*Wqkv\.bias"),
        ("nomic_vision", (), {"learned_pos_embedding": True}, "learned_pos_embedding is True"),
        ("nomic_vision", (), {"global_pool": "avg"}, "global_pool is 'avg'"),
        ("nomic_vision", (), {"ref_feat_shape": [3, 4]}, "not a square grid"),
        ("nomic_vision", (), {"norm_mlp": False}, r"without a place in the model: .*mlp\.norm"),
        ("nomic_vision", (), {"num_channels": 1}, "1 channels"),
        ("hf_jina_v2", (), {"add_projections": True}, "add_projections is True"),
        ("hf_jina_v2", (), {"text_config_dict": {"embed_dim": 8}}, "text_config_dict is {"),
        ("hf_jina_v2", (), {"truncate_dim": 9}, "truncate_dim is 9: vlm supports 8, 16, 24"),
        ("hf_jina_v1", (), {"truncate_dim": 9}, "truncate_dim is 9: vlm supports 24"),
        ("hf_jina_v2", ("text_config",), {"default_lora_task": "x"}, "'x' is not in lora_adapt"),
        ("hf_jina_v2", ("text_config",), {"hf_model_name_or_path": "x"}, "hf_model_name_or_path"),
        ("hf_jina_v2", ("text_config",), {"embed_dim": 12}, "texts in 12 dimensions and images"),
        ("hf_jina_v2", ("vision_config",), {"post_norm": True}, "post_norm is True"),
        ("hf_jina_v2", ("vision_config",), {"subln": False}, "subln is False"),
        ("hf_jina_v2", ("vision_config",), {"intp_freq": False}, "without intp_freq"),
        ("hf_jina_v1", ("text_config",), {"pooler_type": "x"}, "pooler_type is 'x'"),
        ("hf_jina_v1", ("text_config",), {"proj_type": "mlp"}, r"missing from the file: .*proj\.0"),
    ],
)
def test_options_that_differ_are_refused_by_name(name, part, changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        vlm.load(changed(name, part, changes, tmp_path))


def test_the_adapter_is_named_and_can_be_another(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        model = vlm.load(GOLDEN / "hf_jina_v2")
    assert "texts with the LoRA adapter retrieval.query, merged, as its own code" in caplog.text
    assert model.prompts["retrieval.query"] == "Represent the query: "
    assert model.tokenizer.config.default_prompt is None
    z: dict[str | None, Any] = {"retrieval.query": model.encode_text("a cat")}
    for task in ("retrieval.passage", None):
        part = {"default_lora_task": task}
        folder = changed("hf_jina_v2", ("text_config",), part, tmp_path / str(task))
        z[task] = vlm.load(folder).encode_text("a cat")
    for one, other in itertools.combinations(z.values(), 2):
        assert np.abs(one - other).max() > 0.01
    # Without an adapter the weights are the original ones.
    folder = tmp_path / "None" / "hf_jina_v2"
    tensors = load_file(folder / "model.safetensors")
    middle = ".parametrizations.weight."
    plain = {name.replace(f"{middle}original", ".weight"): x for name, x in tensors.items()}
    plain = {name: x for name, x in plain.items() if middle not in name}
    save_file(plain, folder / "model.safetensors")
    assert np.array_equal(vlm.load(folder).encode_text("a cat"), z[None])


def test_truncate_dim_truncates_as_the_published_encode_functions(tmp_path):
    golden = np.load(GOLDEN / "hf_jina_v2" / "outputs.npz")
    changes = {"truncate_dim": 8, "vision_config_dict": {}, "text_config_dict": None}
    model = vlm.load(changed("hf_jina_v2", (), changes, tmp_path))
    assert (model.config.embed_dim, model.config.full_dim) == (8, 24)
    z = np.asarray(model.model.encode_image(jnp.asarray(golden["pixels"])))
    assert np.abs(z - unit(golden["z_image"][:, :8])).max() < 3e-6
    z = model.encode_text(golden["texts"].tolist())
    assert np.abs(z - unit(golden["z_text"][:, :8])).max() < 3e-6


def test_jina_clip_with_the_files_of_sentence_transformers(tmp_path):
    folder = shutil.copytree(GOLDEN / "hf_jina_v2", tmp_path / "jina")
    modules = [
        {"idx": 0, "path": "", "type": "custom_st.Transformer"},
        {"idx": 1, "path": "1_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    same = vlm.load(GOLDEN / "hf_jina_v2").encode_text("a cat")
    assert np.array_equal(vlm.load(folder).encode_text("a cat"), same)


@pytest.mark.parametrize("name", ["st_nomic", "nomic_vision", "hf_jina_v1", "hf_jina_v2"])
def test_bundles_keep_all_and_other_formats_refuse(name, tmp_path):
    model = vlm.load(GOLDEN / name)
    model.save(tmp_path / "bundle")
    again = vlm.load(tmp_path / "bundle")
    assert again.config == model.config
    if again.config.text.kind != "none":
        assert np.array_equal(again.encode_text("a cat"), model.encode_text("a cat"))
    for form in ("huggingface", "open_clip"):
        with pytest.raises((CheckpointError, ConfigError)):
            model.save(tmp_path / form, format=form)


def test_fine_tuning_moves_every_parameter_of_the_texts():
    """Rotations, ALiBi and gated MLPs have gradients, and half precision is close."""
    for name in ("st_nomic", "hf_jina_v1"):
        model = vlm.load(GOLDEN / name)
        tokens = jnp.asarray(model.tokenizer(["a photo of a cat"]))
        graph, state = nnx.split(model.model)
        weights = jnp.arange(model.embed_dim)

        def loss(state, graph=graph, tokens=tokens, weights=weights):
            return (nnx.merge(graph, state).encode_text(tokens) @ weights).sum()

        grads = nnx.to_flat_state(jax.grad(loss)(state))
        for path, grad in grads:
            skipped = path[0] != "text" or path[-2:] == ("key", "bias")
            assert skipped or float(jnp.abs(grad.get_value()).max()) > 0, path
        half = vlm.load(GOLDEN / name, dtype="bfloat16").encode_text("a photo of a cat")
        assert (half * model.encode_text("a photo of a cat")).sum() > 0.995


def test_alibi_adds_no_large_constant_to_the_program():
    n = 512
    tokens = jax.ShapeDtypeStruct((1, n), jnp.int32)
    program = jax.make_jaxpr(vlm.load(GOLDEN / "hf_jina_v1").model.encode_text)(tokens)
    assert max(np.size(x) for x in program.consts) < n * n


def vision(width, image_size, patch_size, layers):
    names = ("rope_embeddings", "intp_freq", "naive_swiglu", "subln")
    return {
        "embed_dim": width, "width": width, "image_size": image_size, "patch_size": patch_size,
        "layers": layers, "mlp_ratio": 2.6667, **dict.fromkeys(names, True),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "sizes"),
    [
        ("jina-clip-v1", "jinaai/jina-bert-flash-implementation", (768, 224, 16, 12)),
        ("jina-clip-v2", "jinaai/jina-embeddings-v3", (1024, 512, 14, 24)),
    ],
)
def test_published_sizes_have_the_parameters_of_the_table(name, text, sizes):
    texts = {"hf_model_name_or_path": text, "embed_dim": sizes[0], "pooler_type": "mean_pooler"}
    values = {"vision_config": vision(*sizes), "text_config": texts}
    config = jina_clip.model_config(values, name)
    entry = catalogue.find(name)
    state = nnx.state(abstract_model(config, jnp.float32))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(state))
    assert count / 1e6 == pytest.approx(entry.parameters, abs=0.01)
    assert config.vision.image_size == entry.image_size
