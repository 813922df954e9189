"""jina-clip-v1 and v2: JinaBERT or jina-embeddings-v3 beside EVA-02 (arXiv:2405.20204, 2412.08802).

A folder gives the text tower by the name of its configuration, whose published sizes are here, with
changes. JinaBERT has ALiBi and gated MLPs, the other rotary positions. The embedding of the only
segment is folded into the table of tokens. The LoRA adapter of `default_lora_task`, which the
published code uses for all texts, is merged as the weights are read. `truncate_dim` truncates all
embeddings, as in the published encode functions.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from vlm.config import ModelConfig, PreprocessConfig, TextConfig, ViTConfig
from vlm.errors import CheckpointError
from vlm.weights import huggingface
from vlm.weights.checkpoint import (
    Checkpoint,
    Computed,
    ComputedTensors,
    float32_rows,
    weights,
    with_zero_biases,
)
from vlm.weights.fields import (
    choice,
    fields,
    integer,
    integers,
    number,
    read_json,
    string,
    with_defaults,
)
from vlm.weights.files import Tensors
from vlm.weights.layers import block, linear, norm
from vlm.weights.nomic import with_segment
from vlm.weights.processors import open_clip_preprocess
from vlm.weights.rules import CONV, FLAT, LINEAR, SCALAR, Rule, leading
from vlm.weights.vocabularies import huggingface_tokenizer

_log = logging.getLogger(__name__)
MODEL_TYPES = ("jina_clip",)
_SIZES = {
    "vocab_size": "vocab_size", "hidden_size": "width", "num_hidden_layers": "depth",
    "num_attention_heads": "heads", "intermediate_size": "mlp_dim", "layer_norm_eps": "norm_eps",
    "max_position_embeddings": "context_length", "pad_token_id": "pad_id",
}  # fmt: skip
_JINABERT = {
    "vocab_size": 30528, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 8192,
    "pad_token_id": 0,
}  # fmt: skip
_V3 = {
    "vocab_size": 250002, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096, "layer_norm_eps": 1e-5, "max_position_embeddings": 8194,
    "pad_token_id": 1, "rotary_emb_base": 20_000.0,
}  # fmt: skip
# Names of the text towers' configurations, and the published values.
_TEXTS: dict[str, dict[str, Any]] = {
    "jinaai/jina-bert-flash-implementation": _JINABERT,
    "jinaai/jina-embeddings-v3": _V3,
    "jinaai/xlm-roberta-flash-implementation": _V3,
}
_LORA = {"lora_rank": 4, "lora_alpha": 1.0}
_VISION = {
    "width": 768, "image_size": 224, "patch_size": 16, "layers": 12, "head_width": 64,
    "mlp_ratio": 4.0, "qkv_bias": True, "rope_embeddings": False, "pt_hw_seq_len": 16,
    "intp_freq": False, "naive_swiglu": False, "subln": False,
}  # fmt: skip
# Options that no published model has.
_OFF = {"post_norm": False, "ls_init_value": None, "add_projections": False}
_POOLS: dict[str, Any] = {"mean_pooler": "mean", "max_pooler": "max", "cls_pooler": "first"}
_LENGTH = 512  # tokens of a text in the published encode_text
_PROCESSOR = ("size", "mean", "std", "interpolation", "resize_mode", "fill_color")
_ROOT = "text_model.transformer."
_PARAMETRIZED = ".parametrizations.weight."


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Configuration of a model of this family.

    Raises:
        CheckpointError: an option that vlm does not support, or a field of another type or size.
    """
    _check(values, where)
    for name in ("text_config_dict", "vision_config_dict"):  # override the towers' fields
        choice(values.get(name) or None, (None,), f"{where}: {name}")
    text, dims = _text(fields(values.get("text_config"), where), f"{where}: text_config")
    vision, width = _vision(fields(values.get("vision_config"), where), f"{where}: vision_config")
    if dims != width:
        raise CheckpointError(f"{where} embeds texts in {dims} dimensions and images in {width}")
    sizes = values.get("matryoshka_dimensions")
    sizes = () if sizes is None else integers(sizes, f"{where}: matryoshka_dimensions")
    short = choice(values.get("truncate_dim") or dims, (*sizes, dims), f"{where}: truncate_dim")
    full = None if short == dims else dims
    return ModelConfig(vision, text, embed_dim=short, full_dim=full, matryoshka=sizes)


def open_checkpoint(folder: epath.Path, values: dict[str, Any], config: ModelConfig) -> Checkpoint:
    """Open the checkpoint in a folder.

    Raises:
        CheckpointError: a file is missing or does not fit.
    """
    where, given = f"{folder / 'config.json'}: text_config", fields(values["text_config"], "")
    options = fields(given.get("hf_model_config_kwargs"), where)
    tensors = _merged(weights(folder, *huggingface.WEIGHTS), given, options, folder.name, where)
    text, vision = config.text_transformer, config.vision
    assert isinstance(vision, ViTConfig)
    root = _ROOT + ("roberta." if text.positions == "rotary" else "")
    tensors = ComputedTensors(tensors, *with_segment(tensors, root, text))
    rules = [
        Rule("logit_scale", "logit_scale", SCALAR),
        *_vision_rules(vision),
        *_text_rules(text, root),
    ]
    tensors = with_zero_biases(tensors, rules, lambda name: ".gated_layers." in name)
    tokenizer = huggingface_tokenizer(folder, config)
    prompts = fields(options.get("task_instructions"), f"{where}: task_instructions")
    named = tuple((name, string(text, f"{where}: {name}")) for name, text in prompts.items())
    default = choice(given.get("default_instruction_task"), (None, *prompts), where)
    named = dataclasses.replace(tokenizer.config, prompts=named, default_prompt=default)
    return huggingface.assemble(
        folder,
        config,
        rules,
        tensors=tensors,
        tokenizer=tokenizer.with_rules(named),
        preprocess=_preprocess(folder, vision.image_size),
        ignored=lambda name: name.endswith(("freqs_cos", "freqs_sin", ".inv_freq")),
        context_length=min(_LENGTH, tokenizer.config.context_length),
    )


def _check(values: dict[str, Any], where: str) -> None:
    for name, off in _OFF.items():
        if values.get(name) is not None:
            choice(values[name], (off,), f"{where}: {name}")


def _text(given: dict[str, Any], where: str) -> tuple[TextConfig, int]:
    """Return the text tower, and the width of its embeddings."""
    name = choice(given.get("hf_model_name_or_path"), _TEXTS, f"{where}.hf_model_name_or_path")
    options = fields(given.get("hf_model_config_kwargs"), where)
    c = with_defaults(options, _TEXTS[name], f"{where}.hf_model_config_kwargs")
    choice(options.get("hidden_act", "gelu"), ("gelu",), f"{where}.hidden_act")
    rotary = "rotary_emb_base" in c
    kind = "rotary" if rotary else "alibi"
    choice(options.get("position_embedding_type", kind), (kind,), f"{where}.position_embedding")
    pooler = given.get("pooler_type") or ("mean_pooler" if rotary else "cls_pooler")
    dims = integer(given.get("embed_dim", 768), f"{where}.embed_dim")
    kinds = (None, "linear", "mlp")
    projection = choice(given.get("proj_type"), kinds, f"{where}.proj_type")
    if projection is None and dims != c["hidden_size"]:
        projection = "linear"
    if projection is not None:
        choice(given.get("proj_bias") or False, (False,), f"{where}.proj_bias")
    text = TextConfig(
        **{ours: c[theirs] for theirs, ours in _SIZES.items()},
        pool=_POOLS[choice(pooler, _POOLS, f"{where}.pooler_type")],
        positions=kind,
        rotary_base=c.get("rotary_emb_base", 10_000.0),
        norm="post",
        mlp="plain" if rotary else "geglu_plain",
        activation="gelu",
        projection=projection or "none",
    )
    return text, dims


def _vision(given: dict[str, Any], where: str) -> tuple[ViTConfig, int]:
    """Return the vision tower, and the width of its embeddings."""
    _check(given, where)
    c = with_defaults(given, _VISION, where)
    for name in ("qkv_bias", "naive_swiglu", "subln"):
        choice(c[name], (True,), f"{where}.{name}")
    dims = integer(given.get("embed_dim", 768), f"{where}.embed_dim")
    projection = choice(given.get("proj_type"), (None, "linear"), f"{where}.proj_type")
    grid, span = c["image_size"] // c["patch_size"], c["pt_hw_seq_len"]
    rotary = c["rope_embeddings"]
    if rotary and not c["intp_freq"]:
        choice(grid, (span,), f"{where}: without intp_freq, the number of rows of patches")
    tower = ViTConfig(
        image_size=c["image_size"],
        patch_size=c["patch_size"],
        width=c["width"],
        depth=c["layers"],
        heads=max(1, c["width"] // c["head_width"]),
        mlp_dim=int(c["width"] * c["mlp_ratio"]),
        rotary=0 if rotary else None,
        rotary_span=span if rotary and span != grid else None,
        rotary_rows_first=rotary,
        pool="class",
        mlp="swiglu",
        attention_norm=True,
        key_bias=False,
        projection="none" if projection is None else "linear_bias",
        norm_eps=1e-6,
    )
    return tower, dims


def _preprocess(folder: epath.Path, image_size: int) -> PreprocessConfig:
    file = folder / "preprocessor_config.json"
    values = read_json(file) if file.exists() else {}
    if values.get("image_processor_type") != "JinaCLIPImageProcessor":
        return huggingface.preprocess_config(folder, image_size)
    choice(values.get("size", 224), (image_size, [image_size, image_size]), f"{file}: size")
    given = {name: values[name] for name in _PROCESSOR if name in values}
    return open_clip_preprocess(given, image_size, f"{file}")


def _merged(
    tensors: Tensors, given: Mapping[str, Any], options: Mapping[str, Any], name: str, where: str
) -> Tensors:
    """Merge the LoRA adapter of the default task into the weights of the text tower."""
    originals = [n for n in tensors.shapes if n.endswith(f"{_PARAMETRIZED}original")]
    if not originals:
        return tensors
    tasks, task = options.get("lora_adaptations"), given.get("default_lora_task")
    if not isinstance(tasks, list) or task not in (None, *tasks):
        raise CheckpointError(
            f"{where}: default_lora_task {task!r} is not in lora_adaptations {tasks!r}"
        )
    adapter = "none of its LoRA adapters" if task is None else f"the LoRA adapter {task}"
    _log.info("%s embeds texts with %s, merged, as its own code does", name, adapter)
    lora = with_defaults(options, _LORA, where)
    scale = 0.0 if task is None else number(lora["lora_alpha"], where) / lora["lora_rank"]
    number_of_task = 0 if task is None else tasks.index(task)
    computed: dict[str, Computed] = {}
    used: set[str] = set()
    for original in originals:
        stem = original.removesuffix("original")
        first, second = f"{stem}0.lora_A", f"{stem}0.lora_B"
        if first not in tensors.shapes or second not in tensors.shapes:
            raise CheckpointError(f"{tensors.where} has no adapter {first}: download it again")
        used |= {original, first, second}

        def rows(start, stop, original=original, factors=(first, second)) -> np.ndarray:
            a, b = (
                tensors.read(factor, number_of_task, number_of_task + 1)[0].astype(np.float32)
                for factor in factors
            )
            # W + B A of a linear layer, and W + A B of a table.
            left, right = (a, b) if "_embeddings." in original else (b, a)
            own = float32_rows(tensors, original, start, stop)
            return own + left[start:stop] @ right * np.float32(scale)

        short = original.removesuffix(f"{_PARAMETRIZED}original")
        computed[f"{short}.weight"] = tuple(tensors.shapes[original]), rows
    return ComputedTensors(tensors, computed, used)


def _text_rules(c: TextConfig, root: str) -> list[Rule]:
    theirs, ours = f"{root}encoder.layers.{{}}", "text.transformer.blocks"
    names = {
        "attention.qkv": "mixer.Wqkv.", "attention.out": "mixer.out_proj",
        "attention_norm": "norm1", "mlp_norm": "norm2",
    }  # fmt: skip
    if c.mlp == "plain":
        mlp = block(theirs, ours, {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"})
    else:
        parts, hidden = ("mlp.gate", "mlp.up"), f"{theirs}.mlp.gated_layers"
        mlp = [
            Rule(f"{hidden}.weight", tuple(f"{ours}.{part}.kernel" for part in parts), LINEAR),
            Rule(f"{hidden}.bias", tuple(f"{ours}.{part}.bias" for part in parts)),
            *linear(f"{theirs}.mlp.wo", f"{ours}.mlp.down"),
        ]
    projection = "text_model.proj"
    projections = {
        "none": [],
        "linear": linear(projection, "text.projection", bias=False),
        "mlp": [
            *linear(f"{projection}.0", "text.projection.up", bias=False),
            *linear(f"{projection}.2", "text.projection.down", bias=False),
        ],
    }
    return [
        Rule(f"{root}embeddings.word_embeddings.weight", "text.embedding"),
        *norm(f"{root}emb_ln", "text.embedding_norm"),
        *block(theirs, ours, names),
        *mlp,
        *projections[c.projection],
    ]


def _vision_rules(c: ViTConfig) -> list[Rule]:
    root, ours = "vision_model", "vision.transformer.blocks"
    theirs = f"{root}.blocks.{{}}"
    attention = f"{theirs}.attn", f"{ours}.attention"
    names = {
        "attention_norm": "norm1", "attention.norm": "attn.inner_attn_ln",
        "attention.out": "attn.proj", "mlp_norm": "norm2", "mlp.gate": "mlp.w1",
        "mlp.up": "mlp.w2", "mlp.norm": "mlp.ffn_ln", "mlp.down": "mlp.w3",
    }  # fmt: skip
    return [
        Rule(f"{root}.cls_token", "vision.class_token", leading(2)),
        Rule(f"{root}.pos_embed", "vision.position", leading(1)),
        *linear(f"{root}.patch_embed.proj", "vision.stem", kernel=CONV),
        *(
            Rule(f"{attention[0]}.{name[0]}_proj.weight", f"{attention[1]}.{name}.kernel", LINEAR)
            for name in ("query", "key", "value")
        ),
        Rule(f"{attention[0]}.q_bias", f"{attention[1]}.query.bias", FLAT),
        Rule(f"{attention[0]}.v_bias", f"{attention[1]}.value.bias", FLAT),
        *block(theirs, ours, names),
        *norm(f"{root}.norm", "vision.norm"),
        *(linear(f"{root}.head", "vision.projection") if c.projection != "none" else []),
    ]
