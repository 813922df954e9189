"""Writes goldens of nomic-embed and jina-clip: small random models in the published layouts.

Run with the extra `peers` installed: python tests/weights/make_nomic_jina.py [NAME ...]

No released library has these models as a whole, so the outputs come from what each has of them:

- st_nomic: transformers' NomicBertModel with sentence-transformers' pooling.
- nomic_vision: `nomic_vision` below, a restatement of the published NomicVisionModel.
- hf_jina_v1: images by timm's Eva; texts by `jinabert` below, a restatement of JinaBERT with ALiBi
  (arXiv:2310.19923). The names of its tensors are those of jina-bert-flash-implementation.
- hf_jina_v2: images by timm's Eva; texts by transformers' JinaEmbeddingsV3Model, whose weights are
  W + B A alpha / rank for the adapter of the default task, and W + A B alpha / rank for tables.
"""

import functools
import json
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import torch
from make_dual_encoders import GOLDEN, text_of, vocabulary_of
from make_huggingface import TEXTS, images, randomise, tokenizer_files, write_outputs
from make_sentence_transformers import modules
from make_sentence_transformers import record as record_text
from PIL import Image
from safetensors.torch import save_file
from timm.models.eva import Eva
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention, silu
from torchvision import transforms
from transformers import (
    CLIPImageProcessorPil,
    JinaEmbeddingsV3Config,
    JinaEmbeddingsV3Model,
    NomicBertConfig,
    NomicBertModel,
)

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def random_weights(shapes: dict[str, tuple], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: float("norm" in name and name.endswith("weight"))
        + 0.3 * torch.randn(shape, generator=generator) / max(1.0, shape[-1] ** 0.5 / 4)
        for name, shape in shapes.items()
    }


def layers(shapes: dict[str, tuple]) -> dict[str, tuple]:
    """Shapes of weights by their names, with those of biases of each "NAME." without an ending."""
    full = {}
    for name, shape in shapes.items():
        if name.endswith("."):
            full |= {f"{name}weight": shape, f"{name}bias": shape[:1]}
        else:
            full[name] = shape
    return full


def heads(x: torch.Tensor, count: int) -> torch.Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def weights_of(w: dict[str, torch.Tensor], name: str) -> tuple:
    return w[f"{name}.weight"], w.get(f"{name}.bias")


# ------------------------------------------------------------------ nomic-embed


def nomic_text(name: str) -> None:
    made = vocabulary_of("bert")
    # The published code rounds the hidden width of 37 up.
    text = text_of("bert", *made) | {"max_position_embeddings": 64, "intermediate_size": 256}
    model = NomicBertModel(NomicBertConfig(**text, layer_norm_eps=1e-12))
    record_text(name, model, made, 41, modules.Pooling(24))
    folder = GOLDEN / name
    file = folder / "config.json"
    values = json.loads(file.read_text())
    # The published fields, without those that vlm does not look at.
    published = {
        "n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 37, "n_positions": 64,
        "layer_norm_epsilon": 1e-12, "vocab_size": values["vocab_size"], "pad_token_id": 0,
        "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None, "rotary_scaling_factor": None, "prenorm": False,
        "activation_function": "swiglu", "qkv_proj_bias": False, "mlp_fc1_bias": False,
        "mlp_fc2_bias": False, "causal": False, "use_rms_norm": False, "type_vocab_size": 2,
        "model_type": "nomic_bert", "architectures": ["NomicBertModel"],
    }  # fmt: skip
    file.write_text(json.dumps(published, indent=1) + "\n")


NOMIC_VISION = {
    "model_type": "nomic_bert", "architectures": ["NomicVisionModel"], "n_embd": 16, "n_layer": 1,
    "n_head": 2, "n_inner": 42.7, "img_size": 32, "patch_size": 8, "num_channels": 3,
    "layer_norm_epsilon": 1e-6, "activation_function": "swiglu", "prenorm": True,
    "norm_mlp": True, "use_rotary_pos_emb": True, "ref_feat_shape": [3, 3],
    "rotary_emb_fraction": 0.0, "qkv_proj_bias": True, "mlp_fc1_bias": True,
    "mlp_fc2_bias": True, "causal": False, "no_last_ln": True, "use_pos_embed": True,
    "learned_pos_embedding": False, "patch_embed_bias": True, "mask_token": False,
}  # fmt: skip


def nomic_shapes(width=16, hidden=256, depth=1, patches=16, patch=192) -> dict[str, tuple]:
    def mlp(name):
        both = {f"{name}.fc11.": (hidden, width), f"{name}.fc12.": (hidden, width)}
        return both | {f"{name}.fc2.": (width, hidden)}

    shapes = {
        "embeddings.cls_token": (1, 1, width), "embeddings.pos_embed": (1, patches + 1, width),
        "embeddings.proj.": (width, patch),
    }  # fmt: skip
    for i in range(depth):
        block = f"layers.{i}"
        shapes |= {
            f"{block}.attn.Wqkv.": (3 * width, width), f"{block}.attn.out_proj.": (width, width),
            f"{block}.norm1.": (width,), f"{block}.norm2.": (width,),
            f"{block}.mlp.norm.": (hidden,), **mlp(f"{block}.mlp"),
        }  # fmt: skip
    pool = "selector.attn"
    shapes |= {
        f"{pool}.latent": (1, 1, width), f"{pool}.Wq.": (width, width),
        f"{pool}.Wkv.": (2 * width, width), f"{pool}.out_proj.": (width, width),
        "selector.norm1.": (width,), **mlp("selector.mlp"),
    }  # fmt: skip
    return layers(shapes)


def nomic_vision(w: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """Images (b, 3, 32, 32) to embeddings, by the equations of the published model."""
    norm = lambda x, name, eps=1e-6: layer_norm(x, x.shape[-1:], *weights_of(w, name), eps)  # noqa: E731

    def mlp(x, name, normed):
        x = linear(x, *weights_of(w, f"{name}.fc11")) * silu(
            linear(x, *weights_of(w, f"{name}.fc12"))
        )
        x = norm(x, f"{name}.norm", 1e-5) if normed else x
        return linear(x, *weights_of(w, f"{name}.fc2"))

    # Rows rotate the first half of a head, columns the second, both scaled to the grid of 3.
    place = torch.arange(4) / 4 * 3
    bands = 10_000.0 ** -(torch.arange(2) / 2)
    angles = torch.cat(
        [place.repeat_interleave(4)[:, None] * bands, place.repeat(4)[:, None] * bands], 1
    ).repeat_interleave(2, 1)

    def rotate(x):
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * angles.cos() + turned * angles.sin()

    patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8)  # b, colour, row, column, 8, 8
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = linear(patches, *weights_of(w, "embeddings.proj"))
    x = torch.cat([w["embeddings.cls_token"].expand(len(x), 1, -1), x], 1)
    x = x + w["embeddings.pos_embed"]
    for i in range(NOMIC_VISION["n_layer"]):
        block = f"layers.{i}"
        qkv = linear(norm(x, f"{block}.norm1"), *weights_of(w, f"{block}.attn.Wqkv"))
        q, k, v = (heads(part, 2) for part in qkv.chunk(3, -1))
        q, k = (torch.cat([part[:, :, :1], rotate(part[:, :, 1:])], 2) for part in (q, k))
        y = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(y, *weights_of(w, f"{block}.attn.out_proj"))
        x = x + mlp(norm(x, f"{block}.norm2"), f"{block}.mlp", normed=True)
    pool = "selector.attn"
    q = linear(w[f"{pool}.latent"].expand(len(x), 1, -1), *weights_of(w, f"{pool}.Wq"))
    k, v = linear(x, *weights_of(w, f"{pool}.Wkv")).chunk(2, -1)
    y = scaled_dot_product_attention(*(heads(part, 2) for part in (q, k, v)))
    y = linear(y.transpose(1, 2).flatten(2), *weights_of(w, f"{pool}.out_proj"))
    return (x + mlp(norm(y, "selector.norm1"), "selector.mlp", normed=False))[:, 0]


def nomic_images(name: str) -> None:
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    w = random_weights(nomic_shapes(), 42)
    save_file(w, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(NOMIC_VISION, indent=1) + "\n")
    size = {"height": 32, "width": 32}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
    processor.save_pretrained(folder)
    raw = images(42)
    pixels = processor([Image.fromarray(i) for i in raw], return_tensors="pt")["pixel_values"]
    np.savez_compressed(
        folder / "image.npz",
        **{f"image/{i}": image for i, image in enumerate(raw)},
        pixels=pixels.permute(0, 2, 3, 1).numpy(),
        z_image=nomic_vision(w, pixels).numpy(),
    )


# ------------------------------------------------------------------ jina-clip


VISION = {
    "embed_dim": 24, "width": 24, "image_size": 32, "patch_size": 8, "layers": 1, "head_width": 12,
    "mlp_ratio": 2.6667, "qkv_bias": True, "rope_embeddings": True, "pt_hw_seq_len": 3,
    "intp_freq": True, "naive_swiglu": True, "subln": True, "post_norm": False,
    "ls_init_value": None, "patch_dropout": 0.1, "proj_type": None,
}  # fmt: skip
EVA_NAMES = {
    "attn.norm": "attn.inner_attn_ln", "attn.q_proj.bias": "attn.q_bias",
    "attn.v_proj.bias": "attn.v_bias", "mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2",
    "mlp.fc2": "mlp.w3", "mlp.norm": "mlp.ffn_ln",
}  # fmt: skip


def eva(seed: int) -> tuple[Eva, dict[str, torch.Tensor]]:
    """A vision tower, and its tensors under the names of jina-clip."""
    model = Eva(
        img_size=32, patch_size=8, num_classes=0, global_pool="token", embed_dim=24, depth=1,
        num_heads=2, mlp_ratio=2.6667, qkv_fused=False, swiglu_mlp=True, scale_mlp=True,
        scale_attn_inner=True, use_rot_pos_emb=True, ref_feat_shape=(3, 3), use_fc_norm=False,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    randomise(model, seed)
    model.eval()
    tensors = {}
    for name, tensor in model.state_dict().items():
        for theirs, published in EVA_NAMES.items():
            name = name.replace(theirs, published)
        tensors[f"vision_model.{name}"] = tensor.detach().clone()
    return model, tensors


def alibi(count: int, length: int) -> torch.Tensor:
    """Slopes of a power of two, and every other one of the next power for more heads."""

    def slopes(n):
        if math.log2(n).is_integer():
            return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]
        power = 2 ** math.floor(math.log2(n))
        return slopes(power) + slopes(2 * power)[0::2][: n - power]

    places = torch.arange(length)
    return -torch.tensor(slopes(count))[:, None, None] * (places[:, None] - places).abs()


def jinabert(w: dict[str, torch.Tensor], tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the tokens after post-norm blocks with ALiBi and GEGLU."""
    norm = lambda x, name: layer_norm(x, x.shape[-1:], *weights_of(w, name), 1e-12)  # noqa: E731
    x = w["embeddings.word_embeddings.weight"][tokens]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "emb_ln")
    bias = alibi(3, tokens.shape[1]) + torch.where(mask.bool(), 0.0, -torch.inf)[:, None, None]
    for i in range(2):
        block = f"encoder.layers.{i}"
        qkv = linear(x, *weights_of(w, f"{block}.mixer.Wqkv")).chunk(3, -1)
        y = scaled_dot_product_attention(*(heads(part, 3) for part in qkv), attn_mask=bias)
        y = linear(y.transpose(1, 2).flatten(2), *weights_of(w, f"{block}.mixer.out_proj"))
        x = norm(x + y, f"{block}.norm1")
        gate, up = linear(x, w[f"{block}.mlp.gated_layers.weight"]).chunk(2, -1)
        x = norm(x + linear(gelu(gate) * up, *weights_of(w, f"{block}.mlp.wo")), f"{block}.norm2")
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def jinabert_shapes(vocabulary: int, width=24, hidden=37) -> dict[str, tuple]:
    shapes = {
        "embeddings.word_embeddings.weight": (vocabulary, width),
        "embeddings.token_type_embeddings.weight": (2, width), "emb_ln.": (width,),
    }  # fmt: skip
    for i in range(2):
        block = f"encoder.layers.{i}"
        shapes |= {
            f"{block}.mixer.Wqkv.": (3 * width, width), f"{block}.mixer.out_proj.": (width, width),
            f"{block}.norm1.": (width,), f"{block}.norm2.": (width,),
            f"{block}.mlp.gated_layers.weight": (2 * hidden, width),
            f"{block}.mlp.wo.": (width, hidden),
        }  # fmt: skip
    shapes = layers(shapes)
    return {name.replace("emb_ln", "emb_ln_norm"): shape for name, shape in shapes.items()}


def jina_v1(name: str) -> None:
    made = vocabulary_of("bert")
    w = random_weights(jinabert_shapes(made[0].get_vocab_size()), 44)
    w = {key.replace("emb_ln_norm", "emb_ln"): value for key, value in w.items()}
    text = {
        "embed_dim": 24, "hf_model_name_or_path": "jinaai/jina-bert-flash-implementation",
        "pooler_type": "mean_pooler", "proj_type": None, "proj_bias": False,
        "hf_model_config_kwargs": sizes(made) | {"max_position_embeddings": 13},
    }  # fmt: skip
    record(name, w, "text_model.transformer.", text, made, 43, lambda *given: jinabert(w, *given))


def sizes(made) -> dict[str, int]:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "pad_token_id")  # fmt: skip
    text = text_of("bert", *made)
    return {name: text[name] for name in names}


def jina_v2(name: str) -> None:
    made = vocabulary_of("roberta")
    options = sizes(made) | {"max_position_embeddings": 13}
    model = JinaEmbeddingsV3Model(JinaEmbeddingsV3Config(**options), add_pooling_layer=False)
    randomise(model, 46)
    model.eval()
    generator, published = torch.Generator().manual_seed(47), {}
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    tasks, rank, alpha = ["retrieval.passage", "retrieval.query"], 4, 2
    for key in [key for key in state if "q_proj" in key]:  # the published code has them in one
        parts = [state.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        state[key.replace("self_attn.q_proj", "mixer.Wqkv")] = torch.cat(parts)
    renamed = {
        "embeddings.LayerNorm": "emb_ln", "layers.": "encoder.layers.",
        "self_attn.o_proj": "mixer.out_proj", "post_attention_layernorm": "norm1",
        "post_mlp_layernorm": "norm2",
    }  # fmt: skip
    adapted = dict(state)
    for key, tensor in state.items():
        theirs = key
        for native, old in renamed.items():
            theirs = theirs.replace(native, old)
        if tensor.ndim < 2:
            published[theirs] = tensor
            continue
        table = "_embeddings." in key
        rows, columns = tensor.shape
        shapes = [(rows, rank), (rank, columns)] if table else [(rank, columns), (rows, rank)]
        a, b = (0.2 * torch.randn((len(tasks), *s), generator=generator) for s in shapes)
        product = a[1] @ b[1] if table else b[1] @ a[1]
        adapted[key] = tensor + product * (alpha / rank)
        stem = theirs.replace(".weight", ".parametrizations.weight.")
        published |= {f"{stem}original": tensor, f"{stem}0.lora_A": a, f"{stem}0.lora_B": b}
    for key in [key for key in adapted if "Wqkv" in key]:
        for part, value in zip("qkv", adapted.pop(key).chunk(3), strict=True):
            adapted[key.replace("mixer.Wqkv", f"self_attn.{part}_proj")] = value
    model.load_state_dict(adapted)
    text = {
        "embed_dim": 24, "hf_model_name_or_path": "jinaai/jina-embeddings-v3",
        "default_lora_task": "retrieval.query", "default_instruction_task": None,
        "pooler_type": None, "proj_type": None, "proj_bias": False,
        "hf_model_config_kwargs": options | {
            "lora_adaptations": tasks, "lora_rank": rank, "lora_alpha": alpha,
            "task_instructions": {"retrieval.query": "Represent the query: ",
                                  "retrieval.passage": "Represent the passage: "},
        },
    }  # fmt: skip

    def embed(tokens, mask):
        hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    more = {"matryoshka_dimensions": [8, 16, 24]}
    record(name, published, "text_model.transformer.roberta.", text, made, 45, embed, **more)


def record(name, texts, root, text_config, made, seed, embed, **more) -> None:
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tower, tensors = eva(seed)
    tensors |= {root + key: value.contiguous() for key, value in texts.items()}
    save_file(tensors | {"logit_scale": torch.tensor(2.3)}, folder / "model.safetensors")
    values = {
        "model_type": "jina_clip", "architectures": ["JinaCLIPModel"], "add_projections": False,
        "projection_dim": 24, "text_config": text_config, "vision_config": VISION, **more,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n")
    processor = {
        "image_processor_type": "JinaCLIPImageProcessor", "processor_class": "JinaCLIPProcessor",
        "size": 32, "mean": CLIP_MEAN, "std": CLIP_STD, "resize_mode": "shortest",
        "interpolation": "bicubic", "fill_color": 0,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")
    vocabulary, _, pad, eos = made
    tokenizer_files(folder, vocabulary, "PreTrainedTokenizerFast", pad, eos)
    raw = images(seed)
    transform = transforms.Compose([
        transforms.Resize(32, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(32),
        transforms.ToTensor(), transforms.Normalize(CLIP_MEAN, CLIP_STD),
    ])  # fmt: skip
    pixels = torch.stack([transform(Image.fromarray(image)) for image in raw])
    vocabulary.enable_padding(length=13, pad_id=pad, pad_token=vocabulary.id_to_token(pad))
    vocabulary.enable_truncation(13)
    encoded = vocabulary.encode_batch(TEXTS)
    tokens = torch.tensor([e.ids for e in encoded])
    image, text = tower(pixels), embed(tokens, (tokens != pad).long())
    unit = torch.nn.functional.normalize
    logits = math.exp(2.3) * unit(image) @ unit(text).T
    out = SimpleNamespace(image_embeds=image, text_embeds=text, logits_per_image=logits)
    write_outputs(folder, raw, TEXTS, pixels, tokens, out)


MODELS = {
    "st_nomic": nomic_text, "nomic_vision": nomic_images, "hf_jina_v1": jina_v1,
    "hf_jina_v2": jina_v2,
}  # fmt: skip

if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.no_grad():
        for name in sys.argv[1:] or MODELS:
            MODELS[name](name)
