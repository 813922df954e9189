"""nomic-embed: the vision tower of nomic-embed-vision, and nomic-embed-text (arXiv:2402.01613).

Both have the model_type nomic_bert; `Bundle.with_text` makes one model of both towers. The
vision tower is EVA-02's with an attention pool (arXiv:2406.18587), whose norm inside the MLPs has
torch's default epsilon. The text tower is a BERT with rotary positions and gated MLPs without
biases; the embedding of its only segment is folded into the table of tokens. nomic-embed-text-v1
scales its rotary positions for texts beyond those of its training, which vlm does not read.
"""

import dataclasses
import json
import logging
from typing import Any

import numpy as np
from etils import epath

from vlm.config import (
    ModelConfig,
    NoTextConfig,
    NoVisionConfig,
    TextConfig,
    ViTConfig,
)
from vlm.errors import CheckpointError, brief
from vlm.weights import huggingface
from vlm.weights.checkpoint import (
    Checkpoint,
    Computed,
    ComputedTensors,
    float32_rows,
    weights,
    with_zero_biases,
)
from vlm.weights.fields import boolean, choice, fields, number, with_defaults
from vlm.weights.files import Tensors
from vlm.weights.layers import block, fused, heads, linear, norm, out
from vlm.weights.one_tower import text_checkpoint, vision_checkpoint
from vlm.weights.rules import Rule, Transform, leading
from vlm.weights.vocabularies import huggingface_tokenizer

_log = logging.getLogger(__name__)
MODEL_TYPES = ("nomic_bert",)
# The published code's names of fields by those of transformers' NomicBert.
_OLD_NAMES = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "intermediate_size": "n_inner", "max_position_embeddings": "n_positions",
    "layer_norm_eps": "layer_norm_epsilon",
}  # fmt: skip
_TEXT = {
    "vocab_size": 30528, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 2048, "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}  # fmt: skip
_VISION = {
    "n_embd": 768, "n_layer": 12, "n_head": 12, "img_size": 224, "patch_size": 16,
    "num_channels": 3, "layer_norm_epsilon": 1e-5,
}  # fmt: skip
# Defaults of the published configuration class, GPT-2's activation among them.
_PUBLISHED = {"activation_function": "gelu_new", "prenorm": False, "rotary_emb_fraction": 0.0}
# Options that the towers do not have, with the value that turns each off.
_OFF = {
    "causal": False, "parallel_block": False, "use_rms_norm": False, "num_heads_kv": None,
    "rotary_emb_scale_base": None, "rotary_emb_interleaved": False, "rotary_head_dim": False,
    "moe_every_n_layers": 0,
}  # fmt: skip
_TEXT_ONLY = _OFF | {
    "prenorm": False, "activation_function": "swiglu", "hidden_act": "silu",
    "rotary_emb_fraction": 1.0, "norm_mlp": False,
}  # fmt: skip
_VISION_ONLY = _OFF | {
    "prenorm": True, "activation_function": "swiglu", "rotary_emb_fraction": 0,
    "learned_pos_embedding": False, "sinusoidal_pos_embedding": False, "use_pos_embed": True,
    "no_cls_token": False, "no_embed_class": False, "register_tokens": 0, "global_pool": None,
    "layer_scale": False, "prepre_layernom": False,
}  # fmt: skip
# Prompts of the published texts; every text of the model's training had one.
PROMPTS = tuple(
    (name, f"{name}: ")
    for name in ("search_query", "search_document", "classification", "clustering")
)
# Layers with optional biases, and the fields of a text tower that switch them on.
_BIASES = {".attn.": "qkv_proj_bias", ".fc1": "mlp_fc1_bias", ".fc2": "mlp_fc2_bias"}
_WORDS, _SEGMENTS = (f"embeddings.{name}_embeddings.weight" for name in ("word", "token_type"))
_MLP_EPS = 1e-5
_MULTIPLE = 256  # of the width of a gated MLP's hidden layer, in the published code
_PATCHES = Transform(  # a Linear over (colour, row, column)
    lambda s: (s[3], s[2] * s[0] * s[1]),
    lambda x, s: x.reshape(s[3], s[2], s[0], s[1]).transpose(2, 3, 1, 0),
    lambda x: x.transpose(3, 2, 0, 1).reshape(x.shape[3], -1),
)


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Configuration of the tower that a `config.json` describes.

    Raises:
        CheckpointError: an option that vlm does not support, or a field of another type or size.
    """
    if _is_vision(values):
        vision = _vision(values, where)
        return ModelConfig(vision, NoTextConfig(), embed_dim=vision.width)
    text = _text(values, where)
    return ModelConfig(NoVisionConfig(), text, embed_dim=text.width)


def open_checkpoint(folder: epath.Path, values: dict[str, Any], config: ModelConfig) -> Checkpoint:
    """Open the checkpoint in a folder: a vision tower, or a text tower with mean pooling."""
    tensors = weights(folder, *huggingface.WEIGHTS)
    if isinstance(config.vision, ViTConfig):
        _log.info(
            "%s embeds images alone: Bundle.with_text or `vlm convert --text` adds the text tower "
            "of its space, nomic-embed-text of the same version",
            folder.name,
        )
        preprocess = huggingface.preprocess_config(folder, config.vision.image_size)
        rules = _vision_rules(config.vision)
        return vision_checkpoint(
            folder.name, config.vision, config.embed_dim, preprocess, tensors, rules
        )
    tokenizer = huggingface_tokenizer(folder, config)
    prompted = dataclasses.replace(tokenizer.config, prompts=PROMPTS, prompt_required=True)
    tokenizer = tokenizer.with_rules(prompted)
    root = next((name.removesuffix(_WORDS) for name in tensors.shapes if name.endswith(_WORDS)), "")
    rules = _text_rules(root)
    old = "n_embd" in values  # in the published code's names, where biases are the default
    off = [part for part, field in _BIASES.items() if not values.get(field, old)]
    tensors = with_zero_biases(tensors, rules, lambda name: any(part in name for part in off))
    if values.get("type_vocab_size") != 0:
        tensors = ComputedTensors(tensors, *with_segment(tensors, root, config.text_transformer))
    return text_checkpoint(
        folder.name,
        config,
        tokenizer,
        tensors,
        rules,
        lambda name: name.endswith((".inv_freq", ".position_ids")) or ".pooler." in f".{name}",
    )


def with_segment(
    tensors: Tensors, root: str, config: TextConfig
) -> tuple[dict[str, Computed], set[str]]:
    """Fold the embedding of the only segment into the table of tokens.

    Returns:
        The table of tokens, and the name of the segments' table.

    Raises:
        CheckpointError: one of the tables is missing or of another width.
    """
    words, segments = root + _WORDS, root + _SEGMENTS
    for table in (words, segments):
        if tuple(tensors.shapes.get(table, ()))[1:] != (config.width,):
            raise CheckpointError(
                f"{tensors.where} has no {table} of width {config.width}: download it again"
            )

    def rows(start: int, stop: int | None) -> np.ndarray:
        own = float32_rows(tensors, words, start, stop)
        return own + float32_rows(tensors, segments, 0, 1)

    return {words: (tuple(tensors.shapes[words]), rows)}, {segments}


def _is_vision(values: dict[str, Any]) -> bool:
    return "Vision" in json.dumps([values.get("architectures"), values.get("auto_map")])


def _check(values: dict[str, Any], plain: dict[str, Any], where: str) -> None:
    """Raise a CheckpointError if an option differs from its `plain` value."""
    for name, value in plain.items():
        if values.get(name) is not None:
            choice(values[name], (value,), f"{where}: {name}")


def _published(values: dict[str, Any]) -> dict[str, Any]:
    """Add the defaults of the published configuration class to its fields."""
    return _PUBLISHED | {name: value for name, value in values.items() if value is not None}


def _gated(values: dict[str, Any], width: int, where: str) -> int:
    """Return the hidden width of an MLP of the published code."""
    hidden = number(values.get("n_inner") or 8 * width / 3, f"{where}: n_inner", above=0.0)
    return -(-int(hidden) // _MULTIPLE) * _MULTIPLE


def _text(values: dict[str, Any], where: str) -> TextConfig:
    old = "n_embd" in values
    _check(_published(values) if old else values, _TEXT_ONLY, where)
    own = {new: values[old] for new, old in _OLD_NAMES.items() if values.get(old) is not None}
    c = with_defaults(values | own, _TEXT, where)
    length, ropes = c["max_position_embeddings"], fields(values.get("rope_parameters"), where)
    default = 10_000.0 if old else 1000.0
    base = ropes.get("rope_theta") or values.get("rotary_emb_base") or default
    scaled = ropes.get("rope_type", "default") != "default" or values.get("rotary_scaling_factor")
    if scaled:  # only beyond the length of its training
        trained = values.get("max_trained_positions") or 2048
        trained = ropes.get("original_max_position_embeddings") or trained
        length = min(length, trained)
        _log.info("%s scales its positions beyond %d tokens: vlm cuts texts there", where, length)
    return TextConfig(
        vocab_size=c["vocab_size"],
        context_length=length,
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        mlp_dim=_gated(values, c["hidden_size"], where) if old else c["intermediate_size"],
        pool="mean",
        positions="rotary",
        rotary_base=number(base, f"{where}: rotary_emb_base", above=0.0),
        pad_id=c["pad_token_id"],
        norm="post",
        mlp="swiglu_plain",
        projection="none",
        norm_eps=c["layer_norm_eps"],
    )


def _vision(values: dict[str, Any], where: str) -> ViTConfig:
    _check(_published(values), _VISION_ONLY, where)
    c = huggingface.fields_of_tower(values, _VISION, where)
    rotary = boolean(values.get("use_rotary_pos_emb") or False, f"{where}: use_rotary_pos_emb")
    grid = c["img_size"] // c["patch_size"]
    span = values.get("ref_feat_shape")
    span = [span, span] if isinstance(span, int) else span or [grid, grid]
    if not isinstance(span, list) or len(span) != 2 or span[0] != span[1]:
        raise CheckpointError(f"{where}: ref_feat_shape is {brief(span)}, not a square grid")
    normed = boolean(values.get("norm_mlp") or False, f"{where}: norm_mlp")
    return ViTConfig(
        image_size=c["img_size"],
        patch_size=c["patch_size"],
        width=c["n_embd"],
        depth=c["n_layer"],
        heads=c["n_head"],
        mlp_dim=_gated(values, c["n_embd"], where),
        rotary=0 if rotary else None,
        rotary_span=span[0] if rotary and span[0] != grid else None,
        rotary_rows_first=rotary,
        pool="class_map",
        mlp="swiglu" if normed else "swiglu_plain",
        mlp_norm_eps=_MLP_EPS if normed else None,
        last_norm=False,
        projection="none",
        norm_eps=c["layer_norm_epsilon"],
    )


_BLOCK = {
    "attention.qkv": "attn.Wqkv.", "attention.out": "attn.out_proj", "attention_norm": "norm1",
    "mlp.up": "mlp.fc11", "mlp.gate": "mlp.fc12", "mlp.down": "mlp.fc2", "mlp_norm": "norm2",
}  # fmt: skip


def _text_rules(root: str) -> list[Rule]:
    return [
        Rule(root + _WORDS, "text.embedding"),
        *norm(f"{root}emb_ln", "text.embedding_norm"),
        *block(f"{root}encoder.layers.{{}}", "text.transformer.blocks", _BLOCK),
    ]


def _vision_rules(c: ViTConfig) -> list[Rule]:
    names = _BLOCK | ({"mlp.norm": "mlp.norm"} if c.mlp == "swiglu" else {})
    pool, ours = "selector.attn", "vision.pool.attention"
    return [
        Rule("embeddings.cls_token", "vision.class_token", leading(2)),
        Rule("embeddings.pos_embed", "vision.position", leading(1)),
        *linear("embeddings.proj", "vision.stem", kernel=_PATCHES),
        *block("layers.{}", "vision.transformer.blocks", names),
        Rule(f"{pool}.latent", "vision.pool.probe", leading(1)),
        *heads(f"{pool}.Wq", f"{ours}.query"),
        *fused(f"{pool}.Wkv.", ours, "key", "value"),
        *out(f"{pool}.out_proj", f"{ours}.out"),
        *block(
            "selector",
            "vision.pool",
            {"norm": "norm1", "mlp.up": "mlp.fc11", "mlp.gate": "mlp.fc12", "mlp.down": "mlp.fc2"},
        ),
    ]
