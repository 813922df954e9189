"""Folders of sentence-transformers: `modules.json` lists the modules of a model.

Read are dual encoders such as CLIP (`0_CLIPModel`, or beside `modules.json`), and text encoders of
BERT's kind with pooling and one linear layer, such as clip-ViT-B-32-multilingual-v1, which embed
texts alone, and nomic-embed-text. A layer with an activation is refused. Prompts become those of
the tokenizer.
"""

import dataclasses
import os
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from etils import epath

from vlm.config import ModelConfig, NoVisionConfig, TextConfig, TextPool
from vlm.errors import CheckpointError, brief
from vlm.inputs.tokenizer import Tokenizer
from vlm.weights import huggingface, nomic, transformers_folders
from vlm.weights.checkpoint import Checkpoint, Computed, ComputedTensors, weight_names, weights
from vlm.weights.fields import boolean, choice, fields, integer, read_json, read_list, string
from vlm.weights.files import Tensors
from vlm.weights.layers import block, linear, norm
from vlm.weights.not_read import refuse_by_name
from vlm.weights.one_tower import text_checkpoint
from vlm.weights.rules import Rule
from vlm.weights.text_encoders import bert_positions, bert_rules, first_position
from vlm.weights.vision_text import TEXTS, bert_text
from vlm.weights.vocabularies import huggingface_tokenizer

MODULES = "modules.json"
_SETTINGS = "config_sentence_transformers.json"
_OPTIONS = "sentence_bert_config.json"
_FIRST = ("CLIPModel", "Transformer")
_ROOT = "encoder"  # prefix of the names of the text encoder
_BERTS = tuple(kind for kind in TEXTS if kind != "clip_text_model")
_ENCODERS = (*_BERTS, "distilbert", *nomic.MODEL_TYPES)
# DistilBERT (arXiv:1910.01108): its fields by BERT's, and its layers.
_DISTILLED = {
    "hidden_size": "dim", "intermediate_size": "hidden_dim", "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads", "hidden_act": "activation",
}  # fmt: skip
_DISTILLED_LAYERS = {
    "attention.query": "attention.q_lin", "attention.key": "attention.k_lin",
    "attention.value": "attention.v_lin", "attention.out": "attention.out_lin",
    "attention_norm": "sa_layer_norm", "mlp.up": "ffn.lin1", "mlp.down": "ffn.lin2",
    "mlp_norm": "output_layer_norm",
}  # fmt: skip
_POOLS: dict[str, TextPool] = {"cls": "first", "mean": "mean", "max": "max"}
_OLD_POOLS = {
    "pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
}  # fmt: skip


def recognises(path: epath.Path) -> bool:
    """Whether `path` is a folder of sentence-transformers with a first module that vlm reads."""
    return (path / MODULES).exists() and _modules(path / MODULES)[0][0] in _FIRST


class Modules(NamedTuple):
    """Files of a repository that lie in the folders of its modules."""

    root: str = ""  # of the first module, with a "/" at its end
    settings: Sequence[str] = ()
    weights: Sequence[str] = ()  # of a Dense module
    of_text: bool = False


def modules(folder: epath.Path, files: Collection[str], names: Collection[str]) -> Modules:
    """Return which of a repository's `files` to download, by its `modules.json` in `folder`.

    `names` are those of files that vlm reads beside weights.
    """
    if MODULES not in files or not recognises(folder):
        return Modules()
    (_, path), *rest = _modules(folder / MODULES)
    root = f"{path}/" if path else ""
    wanted = [_SETTINGS, *(f"{root}{name}" for name in (*names, _OPTIONS))]
    wanted += [f"{path}/config.json" for _, path in rest]
    dense = [
        next((f"{path}/{name}" for name in weight_names("model") if f"{path}/{name}" in files), "")
        for name, path in rest
        if name == "Dense"
    ]
    kept = [file for file in wanted if file in files]
    of_text = any(name == "Pooling" for name, _ in rest)
    return Modules(root, kept, [file for file in dense if file], of_text)


def check_encoder(values: dict[str, Any], where: str) -> None:
    """Raise a CheckpointError if the `config.json` of a text encoder is not one that vlm reads."""
    refuse_by_name(values, where)
    choice(values.get("model_type"), _ENCODERS, f"{where}: model_type")


def open_checkpoint(folder: epath.Path) -> Checkpoint:
    """Open the checkpoint in a folder.

    Raises:
        CheckpointError: a module or option that vlm does not support, or missing files.
    """
    (_, path), *rest = _modules(folder / MODULES)
    inner = folder / path if path else folder
    values = read_json(inner / "config.json")
    refuse_by_name(values, os.fspath(inner / "config.json"))
    if rest and rest[-1][0] == "Normalize":  # as vlm does
        rest = rest[:-1]
    if values.get("model_type") in _ENCODERS and any(name == "Pooling" for name, _ in rest):
        return _with_prompts(_open_text(folder, inner, values, rest), folder)
    if rest:
        raise CheckpointError(
            f"{folder / MODULES} has {rest[0][0]} after a dual encoder: vlm reads dual encoders "
            "without more modules"
        )
    dual = dataclasses.replace(transformers_folders.open_checkpoint(inner), name=folder.name)
    return _with_prompts(dual, folder)


def _modules(file: epath.Path) -> list[tuple[str, str]]:
    """Return the class and folder of each module in a `modules.json`.

    Raises:
        CheckpointError: it is not a list of modules in folders beside it.
    """
    listed = read_list(file)
    found = []
    for number, module in enumerate(listed):
        where = f"{file}: module {number}"
        values = fields(module, where)
        path = string(values.get("path", ""), f"{where}: path")
        if path and (path.startswith(".") or "/" in path.rstrip("/") or "\\" in path):
            raise CheckpointError(f"{where} has the path {brief(path)}, not a folder beside it")
        name = string(values.get("type", ""), f"{where}: type").rpartition(".")[2]
        found.append((name, path.rstrip("/")))
    if not found:
        raise CheckpointError(f"{file} lists no modules: download it again")
    return found


def _with_prompts(checkpoint: Checkpoint, folder: epath.Path) -> Checkpoint:
    """Add the prompts in the settings of sentence-transformers to the tokenizer."""
    file = folder / _SETTINGS
    values = read_json(file) if file.exists() else {}
    named = fields(values.get("prompts"), f"{file}: prompts")
    prompts = {name: string(text, f"{file}: prompts.{name}") for name, text in named.items()}
    default = values.get("default_prompt_name")
    if default is not None:
        choice(default, tuple(prompts), f"{file}: default_prompt_name")
    rules = {"prompts": tuple(prompts.items()), "default_prompt": default}
    if not any(prompts.values()):  # sentence-transformers writes empty ones
        return checkpoint
    tokenizer = checkpoint.tokenizer
    tokenizer = tokenizer.with_rules(dataclasses.replace(tokenizer.config, **rules))
    return dataclasses.replace(checkpoint, tokenizer=tokenizer)


def _open_text(
    folder: epath.Path, inner: epath.Path, values: dict[str, Any], rest: list[tuple[str, str]]
) -> Checkpoint:
    """Open a text encoder, its pooling, and a linear layer if it has one."""
    kind, names = values["model_type"], [name for name, _ in rest]
    if names not in (["Pooling"], ["Pooling", "Dense"]):
        raise CheckpointError(
            f"{folder / MODULES} has the modules {', '.join(names) or 'none'} after the encoder: "
            "vlm reads Pooling, and then one Dense or none"
        )
    where, distilled = os.fspath(inner / "config.json"), kind == "distilbert"
    if kind in nomic.MODEL_TYPES:
        return _open_nomic(folder, inner, values, rest)
    text = _distilled(values, where) if distilled else bert_text(values, kind, where)
    dense, width = None, text.width
    if len(rest) == 2:
        dense, width = _dense(folder / rest[1][1], text.width)
    projection = "none" if dense is None else "linear"
    if dense is not None and "linear.bias" in dense.shapes:
        projection = "linear_bias"
    pool = _pool(folder / rest[0][1] / "config.json")
    text = dataclasses.replace(text, pool=pool, pooler=False, projection=projection)
    config = ModelConfig(NoVisionConfig(), text, embed_dim=width)
    tensors = _named(weights(inner, *huggingface.WEIGHTS), dense)
    if not distilled:
        computed = bert_positions(tensors, _ROOT, text, first_position(text))
        tensors = ComputedTensors(tensors, *computed)
    layers = linear("dense.linear", "text.projection", bias=projection == "linear_bias")
    tokenizer = huggingface_tokenizer(inner, config)
    tokenizer, length = _with_options(tokenizer, inner, text.context_length)
    rules = _distilled_rules() if distilled else bert_rules(_ROOT)
    return text_checkpoint(
        folder.name,
        config,
        tokenizer,
        tensors,
        [*rules, *([] if dense is None else layers)],
        lambda name: name.startswith(f"{_ROOT}.pooler.") or name.endswith(".position_ids"),
        context_length=length,
    )


def _with_options(tokenizer: Tokenizer, inner: epath.Path, positions: int) -> tuple[Tokenizer, int]:
    """Return the tokenizer of an encoder with its options, and the length of a text by default.

    `max_seq_length` overrides the tokenizer's own length, as in sentence-transformers.
    """
    settings, length = inner / _OPTIONS, tokenizer.config.context_length
    options = read_json(settings) if settings.exists() else {}
    most = integer(options.get("max_seq_length") or length, f"{settings}: max_seq_length")
    if boolean(options.get("do_lower_case") or False, f"{settings}: do_lower_case"):
        lower = dataclasses.replace(tokenizer.config, lowercase=True)
        tokenizer = tokenizer.with_rules(lower)
    return tokenizer, min(most, positions)


def _open_nomic(
    folder: epath.Path, inner: epath.Path, values: dict[str, Any], rest: list[tuple[str, str]]
) -> Checkpoint:
    """Open nomic-embed-text, with its pooling."""
    if len(rest) > 1:
        raise CheckpointError(f"{folder / MODULES} has {rest[1][0]} after nomic-embed-text")
    config = nomic.model_config(values, os.fspath(inner / "config.json"))
    pool = _pool(folder / rest[0][1] / "config.json")
    text = dataclasses.replace(config.text_transformer, pool=pool)
    config = dataclasses.replace(config, text=text)
    checkpoint = nomic.open_checkpoint(inner, values, config)
    tokenizer, length = _with_options(checkpoint.tokenizer, inner, text.context_length)
    same = {"name": folder.name, "tokenizer": tokenizer, "context_length": length}
    return dataclasses.replace(checkpoint, **same)


def _distilled(values: dict[str, Any], where: str) -> TextConfig:
    """Configuration of a DistilBERT, which is a BERT without segments."""
    choice(values.get("sinusoidal_pos_embds", False), (False,), f"{where}: sinusoidal_pos_embds")
    given = {ours: values[theirs] for ours, theirs in _DISTILLED.items() if theirs in values}
    same = ("vocab_size", "max_position_embeddings", "pad_token_id")
    given |= {name: values[name] for name in same if name in values}
    return bert_text({"num_hidden_layers": 6, **given}, "bert", where)


def _distilled_rules() -> list[Rule]:
    tables = f"{_ROOT}.embeddings"
    return [
        Rule(f"{tables}.word_embeddings.weight", "text.embedding"),
        Rule(f"{tables}.position_embeddings.weight", "text.position"),
        *norm(f"{tables}.LayerNorm", "text.embedding_norm"),
        *block(f"{_ROOT}.transformer.layer.{{}}", "text.transformer.blocks", _DISTILLED_LAYERS),
    ]


def _pool(file: epath.Path) -> TextPool:
    values = read_json(file)
    if not boolean(values.get("include_prompt", True), f"{file}: include_prompt"):
        raise CheckpointError(
            f"{file} has include_prompt false: vlm pools all tokens of a text, with its prompt"
        )
    if "pooling_mode" in values:
        mode = choice(values["pooling_mode"], _POOLS, f"{file}: pooling_mode")
    else:
        on = [name for name, value in values.items() if name.startswith("pooling_") and value]
        mode = _OLD_POOLS.get(on[0] if len(on) == 1 else "")
        if mode is None:
            raise CheckpointError(
                f"{file} has the poolings {', '.join(on) or 'none'}: vlm supports one of "
                f"{', '.join(_OLD_POOLS)}"
            )
    return _POOLS[mode]


def _dense(folder: epath.Path, width: int) -> tuple[Tensors, int]:
    """Return the tensors of a Dense module, and its width."""
    file = folder / "config.json"
    values = read_json(file)
    activation = string(values.get("activation_function", ""), f"{file}: activation_function")
    if activation.rpartition(".")[2] != "Identity":
        raise CheckpointError(
            f"{file} has the activation_function {brief(activation)}: vlm reads a Dense without "
            "one (Identity)"
        )
    given = integer(values.get("in_features"), f"{file}: in_features")
    if given != width:
        raise CheckpointError(f"{file} has in_features {given}, and the encoder's width is {width}")
    return (
        weights(folder, *huggingface.WEIGHTS),
        integer(values.get("out_features"), f"{file}: out_features"),
    )


def _named(encoder: Tensors, dense: Tensors | None) -> Tensors:
    """Join the tensors of both modules, with a prefix each."""
    roots = ("bert.", "roberta.", "distilbert.")
    computed: dict[str, Computed] = {}
    parts = {_ROOT: encoder} | ({} if dense is None else {"dense": dense})
    for prefix, tensors in parts.items():
        for name, shape in tensors.shapes.items():
            short = next((name.removeprefix(r) for r in roots if name.startswith(r)), name)
            computed[f"{prefix}.{short}"] = (
                shape,
                lambda start, stop, name=name, tensors=tensors: tensors.read(name, start, stop),
            )
    return ComputedTensors(encoder, computed, encoder.shapes.keys())
