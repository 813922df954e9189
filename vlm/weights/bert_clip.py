"""transformers' dual encoders with CLIP's vision tower and a text tower of BERT's kind.

Chinese CLIP (arXiv:2211.01335) has a BERT; AltCLIP (arXiv:2211.06679) an XLM-RoBERTa whose output
is normalised and goes through two linear layers, which are one here. What depends on no parameter
of ours is folded into the tables as they are read: the segment of all texts, and RoBERTa's first
position.
"""

import os
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Shaped

from vlm.config import ModelConfig, TextConfig, ViTConfig
from vlm.errors import CheckpointError
from vlm.weights import huggingface
from vlm.weights.checkpoint import Checkpoint, weights
from vlm.weights.fields import read_json, with_defaults
from vlm.weights.files import Tensors
from vlm.weights.layers import heads, linear, norm, out
from vlm.weights.rules import Rule
from vlm.weights.vocabularies import check_vocabulary, huggingface_tokenizer

# The defaults of transformers' configuration classes.
_TEXT: dict[str, dict[str, Any]] = {
    "chinese_clip": {
        "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768,
        "intermediate_size": 3072, "vocab_size": 30522, "max_position_embeddings": 512,
        "hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0,
    },
    "altclip": {
        "num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 1024,
        "intermediate_size": 4096, "vocab_size": 250002, "max_position_embeddings": 514,
        "hidden_act": "gelu", "layer_norm_eps": 1e-5, "pad_token_id": 1, "project_dim": 768,
    },
}  # fmt: skip
_PROJECTION = {"chinese_clip": 512, "altclip": 768}
# Tokens of a text, padding included, that the authors use; a tower has positions for more.
_LENGTH = {"chinese_clip": 52, "altclip": 77}
MODEL_TYPES = tuple(_TEXT)


def open_checkpoint(folder: epath.Path) -> Checkpoint:
    """The checkpoint in a folder.

    Raises:
        CheckpointError: it is incomplete, torn or contradictory.
    """
    values = read_json(folder / "config.json")
    family = values["model_type"]
    config = model_config(values, os.fspath(folder / "config.json"))
    tokenizer = huggingface_tokenizer(folder, config)
    check_vocabulary(tokenizer, config, folder)
    tensors = Folded(weights(folder, *huggingface.WEIGHTS), config.text, family)
    return Checkpoint(
        folder.name,
        config,
        huggingface.preprocess_config(folder, config.vision.image_size),
        tokenizer,
        tensors,
        rules(family),
        huggingface.ignored,
        "bicubic",
        context_length=min(_LENGTH[family], config.text.context_length),
    )


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Our configuration of a `config.json` of these families.

    Raises:
        CheckpointError: an unknown activation, or a size that cannot be.
    """
    family = values["model_type"]
    huggingface.check_architecture(values.get("architectures"), where)
    vision = huggingface.tower_fields(
        values, "vision", huggingface.DEFAULTS["clip"]["vision"], where
    )
    text = huggingface.tower_fields(values, "text", _TEXT[family], where)
    first = text["pad_token_id"] + 1 if family == "altclip" else 0
    embed_dim = {"projection_dim": _PROJECTION[family]}
    return ModelConfig(
        ViTConfig(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            **huggingface.tower_sizes(vision, f"{where}: vision_config"),
            pool="class",
            pre_norm=True,
            patch_bias=False,
            projection="linear",
        ),
        TextConfig(
            vocab_size=text["vocab_size"],
            context_length=text["max_position_embeddings"] - first,
            **huggingface.tower_sizes(text, f"{where}: text_config"),
            norm="post",
            last_norm=family == "altclip",
            pool="first",
            pad_id=text["pad_token_id"],
            projection="linear_bias" if family == "altclip" else "linear",
        ),
        embed_dim=with_defaults(values, embed_dim, where)["projection_dim"],
    )


class Folded:
    """The tensors of such a model, or of ALIGN, with all folded in that ours have in them."""

    def __init__(self, tensors: Tensors, config: TextConfig, family: str):
        self.where = tensors.where
        self._tensors = tensors
        root = _root(family)
        # transformers saves AltCLIP's layers by the names of XLM-R, in both towers.
        self._older = {
            name.replace(".encoder.layer.", ".encoder.layers."): name
            for name in tensors.shapes
            if family == "altclip" and ".encoder.layer." in name
        }
        tables = f"{root}.embeddings"
        self._position = f"{tables}.position_embeddings.weight"
        self._segment = f"{tables}.token_type_embeddings.weight"
        self._first = 0
        if family == "altclip" and config.pad_id is not None:
            self._first = config.pad_id + 1
        self._length = config.context_length
        used = {*self._needed(family), *self._older.values()}
        shapes = {name: shape for name, shape in tensors.shapes.items() if name not in used}
        shapes |= {name: tensors.shapes[old] for name, old in self._older.items()}
        missing = [name for name in self._needed(family) if name not in tensors.shapes]
        if missing:
            raise CheckpointError(f"{self.where} has no {', '.join(missing)}: download it again")
        shapes[self._position] = (self._length, config.width)
        if family == "altclip":
            embed_dim = tensors.shapes["text_projection.weight"][0]
            shapes |= {"text_projection.weight": (embed_dim, config.width)}
            shapes |= {"text_projection.bias": (embed_dim,)}
        self._joined = family == "altclip"
        self.shapes = shapes

    def _needed(self, family: str) -> list[str]:
        """What is read for something else than itself."""
        more = ["text_model.transformation.weight", "text_model.transformation.bias"]
        names = [self._position, self._segment]
        return [*names, *more, "text_projection.weight"] if family == "altclip" else names

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "..."]:
        if name == self._position:
            stop = self._length if stop is None else stop
            rows = self._tensors.read(name, start + self._first, stop + self._first)
            return rows.astype(np.float32) + self._tensors.read(self._segment, 0, 1)
        if self._joined and name in ("text_projection.weight", "text_projection.bias"):
            second = self._tensors.read("text_projection.weight").astype(np.float64)
            end = name.rsplit(".", 1)[1]
            first = self._tensors.read(f"text_model.transformation.{end}").astype(np.float64)
            return (second @ first).astype(np.float32)[start:stop]
        return self._tensors.read(self._older.get(name, name), start, stop)


# --------------------------------------------------------------------- their names and ours


def rules(family: str) -> list[Rule]:
    """The table of a model, for tensors that are `Folded`."""
    last = norm("text_model.pre_LN", "text.norm") if family == "altclip" else []
    return [
        *(rule for rule in huggingface.CLIP_RULES if not _of_text(rule)),
        *bert_rules(family),
        *last,
        *linear("text_projection", "text.projection", bias=family == "altclip"),
    ]


def bert_rules(family: str) -> list[Rule]:
    """The table of a model's BERT, for tensors that are `Folded`."""
    root, ours = _root(family), "text.transformer.blocks"
    layer = f"{root}.encoder.layer{'s' if family == 'altclip' else ''}.{{}}"
    attention = f"{layer}.attention"
    return [
        Rule(f"{root}.embeddings.word_embeddings.weight", "text.embedding"),
        Rule(f"{root}.embeddings.position_embeddings.weight", "text.position"),
        *norm(f"{root}.embeddings.LayerNorm", "text.embedding_norm"),
        *heads(f"{attention}.self.query", f"{ours}.attention.query"),
        *heads(f"{attention}.self.key", f"{ours}.attention.key"),
        *heads(f"{attention}.self.value", f"{ours}.attention.value"),
        *out(f"{attention}.output.dense", f"{ours}.attention.out"),
        *norm(f"{attention}.output.LayerNorm", f"{ours}.attention_norm"),
        *linear(f"{layer}.intermediate.dense", f"{ours}.mlp.up"),
        *linear(f"{layer}.output.dense", f"{ours}.mlp.down"),
        *norm(f"{layer}.output.LayerNorm", f"{ours}.mlp_norm"),
    ]


def _root(family: str) -> str:
    return "text_model.roberta" if family == "altclip" else "text_model"


def _of_text(rule: Rule) -> bool:
    return str(rule.ours).startswith("text.")
