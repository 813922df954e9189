"""EVA-CLIP in transformers' layout, against a NumPy transcription of its published forward pass."""

import json
import math
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from seeded import seeded

import vlm
from vlm.errors import CheckpointError

GOLDEN = pathlib.Path(__file__).parent / "golden"
WIDTH, MLP, HEADS, DEPTH, EMBED, PATCH, SIZE, EPS = 24, 40, 2, 2, 20, 8, 32, 1e-6


def write_folder(folder, *, rms, post, k_bias):
    """Save a small model with random weights, and return its tensors."""
    shutil.copytree(GOLDEN / "hf_clip", folder)
    (folder / "preprocessor_config.json").unlink()
    text = json.loads((folder / "config.json").read_text())["text_config"]
    tower = {
        "hidden_size": WIDTH, "intermediate_size": MLP, "num_attention_heads": HEADS,
        "num_hidden_layers": DEPTH, "hidden_act": "gelu", "layer_norm_eps": EPS, "q_bias": True,
        "v_bias": True, "k_bias": k_bias, "use_rms_norm": rms, "post_layernorm": post,
    }  # fmt: skip
    values = {
        "architectures": ["EvaCLIPModel"],
        "model_type": "clip",
        "projection_dim": EMBED,
        "vision_config": tower | {"image_size": SIZE, "patch_size": PATCH},
        "text_config": text | tower,
    }
    (folder / "config.json").write_text(json.dumps(values))
    positions = (SIZE // PATCH) ** 2 + 1
    shapes = {
        "logit_scale": (), "visual_projection.weight": (EMBED, WIDTH),
        "visual_projection.bias": (EMBED,), "text_projection.weight": (EMBED, WIDTH),
        "vision_model.embeddings.class_embedding": (WIDTH,),
        "vision_model.embeddings.patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
        "vision_model.embeddings.patch_embedding.bias": (WIDTH,),
        "vision_model.embeddings.position_embedding.weight": (positions, WIDTH),
        "text_model.embeddings.token_embedding.weight": (text["vocab_size"], WIDTH),
        "text_model.embeddings.position_embedding.weight": (text["max_position_embeddings"], WIDTH),
    }  # fmt: skip
    norms = {"vision_model": ["post_layernorm"], "text_model": ["final_layer_norm"]}
    for part, own in norms.items():
        for layer in (f"{part}.encoder.layers.{n}" for n in range(DEPTH)):
            for x in "qkv":
                shapes[f"{layer}.self_attn.{x}_proj.weight"] = (WIDTH, WIDTH)
                if x != "k" or k_bias:
                    shapes[f"{layer}.self_attn.{x}_proj.bias"] = (WIDTH,)
            shapes[f"{layer}.self_attn.out_proj.weight"] = (WIDTH, WIDTH)
            shapes[f"{layer}.self_attn.out_proj.bias"] = (WIDTH,)
            for name, (rows, columns) in {"fc1": (MLP, WIDTH), "fc2": (WIDTH, MLP)}.items():
                shapes[f"{layer}.mlp.{name}.weight"] = (rows, columns)
                shapes[f"{layer}.mlp.{name}.bias"] = (rows,)
            own = [*own, *(f"{layer}.layer_norm{n}".removeprefix(f"{part}.") for n in (1, 2))]
        for name in own:
            shapes |= {f"{part}.{name}.{kind}": (WIDTH,) for kind in ("weight", "bias")[: 2 - rms]}
    tensors = {name: seeded(name, shape) for name, shape in shapes.items()}
    tensors["logit_scale"] = np.asarray(2.3, np.float32)
    save_file(tensors, folder / "model.safetensors")
    return {name: tensor.astype(np.float64) for name, tensor in tensors.items()}


def forward(w, part, x, *, rms, post, causal):
    """The blocks: norms before or after each branch."""

    def norm(name, x):
        x = x if rms else x - x.mean(-1, keepdims=True)
        x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + EPS)
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def attention(name, x):
        shape = (*x.shape[:2], HEADS, -1)
        q, k, v = (linear(f"{name}.{p}_proj", x).reshape(shape) for p in "qkv")
        logits = np.einsum("bqhd,bkhd->bhqk", q, k) * (WIDTH // HEADS) ** -0.5
        if causal:
            logits = np.where(np.tril(np.ones(logits.shape[-2:], bool)), logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        return linear(f"{name}.out_proj", y)

    def mlp(name, x):
        hidden = linear(f"{name}.fc1", x)
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        return linear(f"{name}.fc2", hidden)

    for layer in (f"{part}.encoder.layers.{n}" for n in range(DEPTH)):
        for number, branch, name in ((1, attention, "self_attn"), (2, mlp, "mlp")):
            y = x if post else norm(f"{layer}.layer_norm{number}", x)
            y = branch(f"{layer}.{name}", y)
            x = x + (norm(f"{layer}.layer_norm{number}", y) if post else y)
    return norm(f"{part}.{'final_layer_norm' if causal else 'post_layernorm'}", x)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("rms", "post", "k_bias"), [(True, False, False), (False, True, True)], ids=["8b", "post"]
)
def test_towers_compute_the_published_forward_pass(rms, post, k_bias, tmp_path):
    w = write_folder(tmp_path / "eva", rms=rms, post=post, k_bias=k_bias)
    model = vlm.load(tmp_path / "eva")
    assert model.preprocess.config.resize == "crop"
    assert np.isclose(model.logit_scale, math.exp(2.3))
    pixels = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)
    side = SIZE // PATCH
    patches = pixels.reshape(2, side, PATCH, side, PATCH, 3).transpose(0, 1, 3, 5, 2, 4)
    patches = patches.reshape(2, side * side, -1).astype(np.float64)
    tables = "vision_model.embeddings"
    x = patches @ w[f"{tables}.patch_embedding.weight"].reshape(WIDTH, -1).T
    x = x + w[f"{tables}.patch_embedding.bias"]
    first = np.broadcast_to(w[f"{tables}.class_embedding"], (2, 1, WIDTH))
    x = np.concatenate([first, x], axis=1) + w[f"{tables}.position_embedding.weight"]
    x = forward(w, "vision_model", x, rms=rms, post=post, causal=False)[:, 0]
    image = unit(x @ w["visual_projection.weight"].T + w["visual_projection.bias"])
    assert np.abs(np.asarray(model.model.encode_image(jnp.asarray(pixels))) - image).max() < 3e-6

    texts = ["a photo of a cat", "x"]
    tokens, tables = model.tokenizer(texts), "text_model.embeddings"
    x = w[f"{tables}.token_embedding.weight"][tokens]
    x = x + w[f"{tables}.position_embedding.weight"][: tokens.shape[1]]
    x = forward(w, "text_model", x, rms=rms, post=post, causal=True)
    text = unit(x[np.arange(2), tokens.argmax(1)] @ w["text_projection.weight"].T)
    assert np.abs(model.encode_text(texts) - text).max() < 3e-6


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vision_config", {"use_rope": True}, "use_rope is on"),
        ("vision_config", {"k_bias": True}, r"missing from the file: .*k_proj\.bias"),
        ("text_config", {"use_rms_norm": "yes"}, "use_rms_norm is 'yes', not true or false"),
        ("text_config", {"q_bias": ...}, "text_config has no q_bias"),
    ],
)
def test_configs_that_differ_are_refused_by_name(part, changes, message, tmp_path):
    write_folder(tmp_path / "eva", rms=True, post=False, k_bias=False)
    file = tmp_path / "eva" / "config.json"
    values = json.loads(file.read_text())
    merged = values[part] | changes
    values[part] = {name: value for name, value in merged.items() if value is not ...}
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        vlm.load(tmp_path / "eva")


def test_a_model_is_not_written_as_clip(tmp_path):
    write_folder(tmp_path / "eva", rms=True, post=False, k_bias=False)
    with pytest.raises(CheckpointError, match="no place for"):
        vlm.load(tmp_path / "eva").save(tmp_path / "back", format="huggingface")
