"""Encoders of transformers as text towers of open_clip folders: BERT, (XLM-)RoBERTa and NLLB.

A folder gives only the encoder's name; all sizes but the number of heads come from its weights. Of
an encoder that `ENCODERS` lacks, the heads come from its `config.json`, if that is in the folder.
Constants are folded into the tables as they are read: the embedding of RoBERTa's only segment, the
offset of its positions (they start after the padding's id), and NLLB's factor and sinusoids.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm.config import TextConfig, TextPool
from vlm.errors import CheckpointError, brief
from vlm.nn.positions import sinusoids
from vlm.weights.checkpoint import Computed, ComputedTensors, float32_rows
from vlm.weights.fields import choice, integer, with_defaults
from vlm.weights.files import Tensors
from vlm.weights.layers import BERT, TRANSFORMERS, block, linear, norm
from vlm.weights.rules import Rule, Shapes, count_layers

PAD_ID = 1  # of RoBERTa and NLLB; BERT's is 0
FIRST = PAD_ID + 1  # row of their first position


def first_position(c: TextConfig) -> int:
    """Row of the first position in the table of an encoder."""
    return FIRST if c.pad_id == PAD_ID else 0


def _encoder(vocab_size: int, width: int, depth: int, heads: int, **options: Any) -> TextConfig:
    roberta: dict[str, Any] = {
        "context_length": 512, "mlp_dim": 4 * width, "pool": "mean", "norm": "post",
        "activation": "gelu", "pad_id": PAD_ID, "norm_eps": 1e-5,
    }  # fmt: skip
    return TextConfig(
        vocab_size=vocab_size,
        width=width,
        depth=depth,
        heads=heads,
        projection="mlp",
        **(roberta | options),
    )


_NLLB_OPTIONS: dict[str, Any] = {
    "context_length": 1024, "pool": "first", "norm": "pre", "activation": "relu"
}  # fmt: skip
_BERT_OPTIONS: dict[str, Any] = {"pad_id": 0, "norm_eps": 1e-12}
# Sizes of the vocabularies of BERTs of 12 layers and 12 heads.
_BERTS = {
    "bert-base-uncased": 30_522,
    "bert-base-cased": 28_996,
    "bert-base-chinese": 21_128,
    "bert-base-multilingual-cased": 119_547,
    "bert-base-multilingual-uncased": 105_879,
    "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract": 30_522,
    "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext": 30_522,
    "microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract": 30_522,
    "microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract-fulltext": 30_522,
    "emilyalsentzer/Bio_ClinicalBERT": 28_996,
    "dmis-lab/biobert-v1.1": 28_996,
    "allenai/scibert_scivocab_uncased": 31_090,
}
# Encoders of the Hub, with open_clip's default pooling and projection.
ENCODERS = {
    "roberta-base": _encoder(50_265, 768, 12, 12),
    "roberta-large": _encoder(50_265, 1024, 24, 16),
    "xlm-roberta-base": _encoder(250_002, 768, 12, 12),
    "xlm-roberta-large": _encoder(250_002, 1024, 24, 16),
    "facebook/nllb-200-distilled-600M": _encoder(256_206, 1024, 12, 16, **_NLLB_OPTIONS),
    "facebook/nllb-200-distilled-1.3B": _encoder(
        256_206, 1024, 24, 16, **_NLLB_OPTIONS, mlp_dim=8192
    ),
    **{name: _encoder(size, 768, 12, 12, **_BERT_OPTIONS) for name, size in _BERTS.items()},
    "bert-large-uncased": _encoder(30_522, 1024, 24, 16, **_BERT_OPTIONS),
    "bert-large-cased": _encoder(28_996, 1024, 24, 16, **_BERT_OPTIONS),
}
# Types of transformers with these parameters, and the fields of their config.json.
_TYPES = ("bert", "roberta", "xlm-roberta", "camembert")
_FIELDS = {
    "num_attention_heads": 12, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0,
    "position_embedding_type": "absolute",
}  # fmt: skip
_ROOT = "text.transformer"
_ROBERTA_EMBEDDING = f"{_ROOT}.embeddings.word_embeddings.weight"
NLLB_EMBEDDING = f"{_ROOT}.embed_tokens.weight"
POSITION = f"{_ROOT}.embeddings.position_embeddings.weight"
SEGMENT = f"{_ROOT}.embeddings.token_type_embeddings.weight"
SINUSOIDS = f"{_ROOT}.embed_positions.weights"


def text_config(
    c: Mapping[str, Any], shapes: Shapes, where: str, about: Mapping[str, Any]
) -> TextConfig:
    """Configuration of the tower of a `text_cfg` with `hf_model_name`.

    `about` is the `config.json` of the encoder, or empty.

    Raises:
        CheckpointError: another encoder, pooler or projection, or other weights.
    """
    name = c["hf_model_name"]
    encoder, pool, pooler, projection = described(c, where, about)
    roberta = encoder.norm == "post"
    if roberta:
        table, layers = _ROBERTA_EMBEDDING, f"{_ROOT}.encoder.layer.{{}}.intermediate.dense.weight"
    else:
        table, layers = NLLB_EMBEDDING, f"{_ROOT}.layers.{{}}.fc1.weight"
    try:
        vocab_size, width = shapes[table]
        positions = shapes[POSITION][0] - first_position(encoder) if roberta else None
        return dataclasses.replace(
            encoder,
            vocab_size=vocab_size,
            context_length=positions or encoder.context_length,
            width=width,
            depth=count_layers(shapes, layers),
            mlp_dim=shapes[layers.format(0)][0],
            pool=pool,
            pooler=pooler,
            projection=projection,
        )
    except (KeyError, ValueError):
        raise CheckpointError(
            f"{where}: the text tower's weights are not those of {brief(name)}"
        ) from None


def described(
    c: Mapping[str, Any], where: str, about: Mapping[str, Any]
) -> tuple[TextConfig, TextPool, bool, Any]:
    """Encoder, pooling, whether BERT's pooler follows it, and projection of a `text_cfg`.

    Raises:
        CheckpointError: another encoder, pooler or projection.
    """
    encoder = _encoder_of(c["hf_model_name"], where, about)
    post = encoder.norm == "post"
    pools: dict[str, TextPool] = {
        "mean_pooler": "mean", "max_pooler": "max", "cls_last_hidden_state_pooler": "first",
        "cls_pooler": "first",
    }  # fmt: skip
    # A null is the default of the architecture, without the layer of `cls_pooler`.
    pooler = c["hf_pooler_type"]
    default = "mean_pooler" if post and encoder.pad_id == PAD_ID else "cls_last_hidden_state_pooler"
    place = f"{where}: text_cfg.hf_pooler_type"
    pool = pools[default if pooler is None else choice(pooler, pools, place)]
    kinds = ("mlp", "linear", None)  # null: none
    projection = choice(c["hf_proj_type"], kinds, f"{where}: text_cfg.hf_proj_type")
    return encoder, pool, post and pooler == "cls_pooler", projection or "none"


def _encoder_of(name: Any, where: str, about: Mapping[str, Any]) -> TextConfig:
    """Encoder of a name, or of the `config.json` of one that is not in the table."""
    known = {of_the_hub.split("/")[-1]: encoder for of_the_hub, encoder in ENCODERS.items()}
    short = str(name).split("/")[-1]
    if short in known:
        return known[short]
    if about.get("model_type") not in _TYPES:
        raise CheckpointError(
            f"{where}: text_cfg.hf_model_name is {brief(name)}, whose sizes vlm does not have: put "
            f"the config.json of that encoder into the folder (of type {', '.join(_TYPES)}), or "
            f"use one of {', '.join(known)}"
        )
    place = f"{where}: config.json"
    given = with_defaults(about, _FIELDS, place)
    choice(given["hidden_act"], ("gelu",), f"{place}: hidden_act")
    choice(given["position_embedding_type"], ("absolute",), f"{place}: position_embedding_type")
    bert = about["model_type"] == "bert"
    pad_id = choice(about.get("pad_token_id", 1 - bert), (1 - bert,), f"{place}: pad_token_id")
    width = integer(about.get("hidden_size", 768), f"{place}: hidden_size")
    heads = given["num_attention_heads"]
    if width % heads:
        raise CheckpointError(f"{place} has hidden_size {width}, no multiple of {heads} heads")
    options = {"pad_id": pad_id, "norm_eps": given["layer_norm_eps"]}
    return _encoder(1, width, 1, heads, **options)  # the other sizes are those of the weights


def reads(shapes: Shapes) -> bool:
    """Whether these tensors are those of such a tower."""
    return _ROBERTA_EMBEDDING in shapes or NLLB_EMBEDDING in shapes


def owns(config: TextConfig) -> bool:
    """Whether a tower is one of these encoders, of any size."""
    if config.norm == "post":
        plain = config.positions == "learned" and config.mlp == "plain"
        return plain and config.pad_id in (0, PAD_ID)
    return config.pad_id == PAD_ID and config.activation == "relu"


# ------------------------------------------------------------------ computed tables


def fold(tensors: Tensors, config: TextConfig) -> ComputedTensors:
    """Fold into the tables of such a tower whatever depends on no other parameter."""
    length, width = config.context_length, config.width
    if _ROBERTA_EMBEDDING in tensors.shapes:
        return ComputedTensors(
            tensors, *bert_positions(tensors, _ROOT, config, first_position(config))
        )
    scale = np.float32(math.sqrt(width))

    def scaled(start: int, stop: int | None) -> np.ndarray:
        return float32_rows(tensors, NLLB_EMBEDDING, start, stop) * scale

    def waves(start: int, stop: int | None) -> np.ndarray:
        return sinusoids(FIRST + length, width)[FIRST:][start:stop]

    return ComputedTensors(
        tensors,
        {
            NLLB_EMBEDDING: ((config.vocab_size, width), scaled),
            SINUSOIDS: ((length, width), waves),
        },
    )


def bert_positions(
    tensors: Tensors, root: str, config: TextConfig, first: int
) -> tuple[dict[str, Computed], set[str]]:
    """Fold the embedding of a BERT's only segment into its position embeddings.

    Returns:
        The table of positions, from row `first` on, and the name of the segments' table.

    Raises:
        CheckpointError: one of the tables is missing or of another width.
    """
    tables = [f"{root}.embeddings.{name}_embeddings.weight" for name in ("position", "token_type")]
    length, width = config.context_length, config.width
    for table in tables:
        if tuple(tensors.shapes.get(table, ()))[1:] != (width,):
            raise CheckpointError(
                f"{tensors.where} has no {table} of width {width}: download it again"
            )
    position, segment = tables

    def rows(start: int, stop: int | None) -> np.ndarray:
        stop = length if stop is None else stop
        own = float32_rows(tensors, position, start + first, stop + first)
        return own + float32_rows(tensors, segment, 0, 1)

    return {position: ((length, width), rows)}, {segment}


_OURS = "text.transformer.blocks"
_NLLB = TRANSFORMERS | {
    "attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm", "mlp.up": "fc1",
    "mlp.down": "fc2",
}  # fmt: skip


def rules(c: TextConfig) -> list[Rule]:
    """Rules of a tower, for tensors made by `fold`."""
    if c.norm == "post":
        table = bert_rules(_ROOT)
        table += linear(f"{_ROOT}.pooler.dense", "text.pooler") if c.pooler else []
    else:
        table = [
            Rule(NLLB_EMBEDDING, "text.embedding"),
            Rule(SINUSOIDS, "text.position"),
            *block(f"{_ROOT}.layers.{{}}", _OURS, _NLLB),
            *norm(f"{_ROOT}.layer_norm", "text.norm"),
        ]
    if c.projection == "mlp":
        table += linear("text.proj.0", "text.projection.up", bias=False)
        table += linear("text.proj.2", "text.projection.down", bias=False)
    elif c.projection == "linear":
        table += linear("text.proj", "text.projection", bias=False)
    return table


def bert_rules(root: str, layers: str = "layer") -> list[Rule]:
    """Rules of a BERT whose segments are folded by `bert_positions`."""
    return [
        Rule(f"{root}.embeddings.word_embeddings.weight", "text.embedding"),
        Rule(f"{root}.embeddings.position_embeddings.weight", "text.position"),
        *norm(f"{root}.embeddings.LayerNorm", "text.embedding_norm"),
        *block(f"{root}.encoder.{layers}.{{}}", _OURS, BERT),
    ]


def ignored(name: str) -> bool:
    """Whether a tensor is a buffer of older versions, without learned values."""
    return name.startswith(f"{_ROOT}.") and name.endswith(
        (".position_ids", ".token_type_ids", "embed_positions.weights")
    )
