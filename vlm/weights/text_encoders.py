"""Encoders of transformers as text towers of open_clip folders: XLM-RoBERTa, RoBERTa and NLLB.

A folder gives only the encoder's name; all sizes but the number of heads come from its weights.
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
from vlm.weights.fields import choice
from vlm.weights.files import Tensors
from vlm.weights.layers import BERT, TRANSFORMERS, block, linear, norm
from vlm.weights.rules import Rule, Shapes, count_layers

PAD_ID = 1  # in all of these vocabularies
FIRST = PAD_ID + 1  # row of the first position


def _encoder(vocab_size: int, width: int, depth: int, heads: int, **options: Any) -> TextConfig:
    roberta: dict[str, Any] = {
        "context_length": 512, "mlp_dim": 4 * width, "pool": "mean", "norm": "post",
        "activation": "gelu",
    }  # fmt: skip
    return TextConfig(
        vocab_size=vocab_size,
        width=width,
        depth=depth,
        heads=heads,
        pad_id=PAD_ID,
        projection="mlp",
        norm_eps=1e-5,
        **(roberta | options),
    )


_NLLB_OPTIONS: dict[str, Any] = {
    "context_length": 1024, "pool": "first", "norm": "pre", "activation": "relu"
}  # fmt: skip
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
}
_ROOT = "text.transformer"
_ROBERTA_EMBEDDING = f"{_ROOT}.embeddings.word_embeddings.weight"
NLLB_EMBEDDING = f"{_ROOT}.embed_tokens.weight"
POSITION = f"{_ROOT}.embeddings.position_embeddings.weight"
SEGMENT = f"{_ROOT}.embeddings.token_type_embeddings.weight"
SINUSOIDS = f"{_ROOT}.embed_positions.weights"


def text_config(c: Mapping[str, Any], shapes: Shapes, where: str) -> TextConfig:
    """Configuration of the tower of a `text_cfg` with `hf_model_name`.

    Raises:
        CheckpointError: another encoder, pooler or projection, or other weights.
    """
    name = c["hf_model_name"]
    known = {of_the_hub.split("/")[-1]: encoder for of_the_hub, encoder in ENCODERS.items()}
    encoder = known[choice(str(name).split("/")[-1], known, f"{where}: text_cfg.hf_model_name")]
    roberta = encoder.norm == "post"
    pools: dict[str, TextPool] = {"mean_pooler": "mean", "cls_last_hidden_state_pooler": "first"}
    if not roberta:
        pools["cls_pooler"] = "first"
    pooler = c["hf_pooler_type"] or ("mean_pooler" if roberta else "cls_pooler")
    if roberta:
        table, layers = _ROBERTA_EMBEDDING, f"{_ROOT}.encoder.layer.{{}}.intermediate.dense.weight"
    else:
        table, layers = NLLB_EMBEDDING, f"{_ROOT}.layers.{{}}.fc1.weight"
    pool = pools[choice(pooler, pools, f"{where}: text_cfg.hf_pooler_type")]
    where_projection = f"{where}: text_cfg.hf_proj_type"
    projection = choice(c["hf_proj_type"] or "mlp", ("mlp", "linear"), where_projection)
    try:
        vocab_size, width = shapes[table]
        return dataclasses.replace(
            encoder,
            vocab_size=vocab_size,
            context_length=shapes[POSITION][0] - FIRST if roberta else encoder.context_length,
            width=width,
            depth=count_layers(shapes, layers),
            mlp_dim=shapes[layers.format(0)][0],
            pool=pool,
            projection=projection,
        )
    except (KeyError, ValueError):
        raise CheckpointError(
            f"{where}: the text tower's weights are not those of {brief(name)}"
        ) from None


def reads(shapes: Shapes) -> bool:
    """Whether these tensors are those of such a tower."""
    return _ROBERTA_EMBEDDING in shapes or NLLB_EMBEDDING in shapes


def owns(config: TextConfig) -> bool:
    """Whether a tower is one of these encoders, of any size."""
    return config.pad_id == PAD_ID and (config.norm == "post" or config.activation == "relu")


# ------------------------------------------------------------------ computed tables


def fold(tensors: Tensors, config: TextConfig) -> ComputedTensors:
    """Fold into the tables of such a tower whatever depends on no other parameter."""
    length, width = config.context_length, config.width
    if _ROBERTA_EMBEDDING in tensors.shapes:
        return ComputedTensors(tensors, *bert_positions(tensors, _ROOT, config, FIRST))
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
    else:
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
