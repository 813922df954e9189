"""transformers' encoders as text towers of open_clip folders: XLM-RoBERTa, RoBERTa, and NLLB's.

A folder gives the encoder's name alone, whose sizes its weights say, but for the heads. What
depends on no parameter of ours is folded into the tables as they are read: RoBERTa's one segment,
its first position (positions are counted from the padding's id), and NLLB's factor and sinusoids.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped

from vlm.config import TextConfig
from vlm.errors import CheckpointError
from vlm.nn.positions import sinusoids
from vlm.weights.fields import show
from vlm.weights.files import Tensors
from vlm.weights.layers import heads, linear, norm, out
from vlm.weights.rules import Rule

PAD_ID = 1  # of all of these vocabularies; positions begin behind it
_FIRST = PAD_ID + 1
# The encoders by the last part of their names: which kind, and heads.
_KNOWN: dict[str, tuple[Literal["roberta", "nllb"], int]] = {
    "roberta-base": ("roberta", 12),
    "roberta-large": ("roberta", 16),
    "xlm-roberta-base": ("roberta", 12),
    "xlm-roberta-large": ("roberta", 16),
    "nllb-200-distilled-600M": ("nllb", 16),
    "nllb-200-distilled-1.3B": ("nllb", 16),
}
_NLLB_LENGTH = 1024  # places that its configuration has
_POOLS = {"mean_pooler": "mean", "cls_last_hidden_state_pooler": "first", "cls_pooler": "first"}
_ROOT = "text.transformer"
_ROBERTA, _NLLB = f"{_ROOT}.embeddings.word_embeddings.weight", f"{_ROOT}.embed_tokens.weight"
_POSITION = f"{_ROOT}.embeddings.position_embeddings.weight"
_SEGMENT = f"{_ROOT}.embeddings.token_type_embeddings.weight"
_SINUSOIDS = f"{_ROOT}.embed_positions.weights"

Shapes = Mapping[str, tuple[int, ...]]


def text_config(c: Mapping[str, Any], embed_dim: int, shapes: Shapes, where: str) -> TextConfig:
    """The tower of a `text_cfg` with `hf_model_name`.

    Raises:
        CheckpointError: another encoder, pooler or projection, or the weights of something else.
    """
    name = c["hf_model_name"]
    kind, count = _KNOWN.get(str(name).split("/")[-1], (None, 0))
    if kind is None:
        raise CheckpointError(
            f"{where}: the text tower {show(name)} of transformers is not one that vlm reads: it "
            f"reads {', '.join(_KNOWN)}"
        )
    default = "mean_pooler" if kind == "roberta" else "cls_pooler"
    pooler, proj = c["hf_pooler_type"] or default, c["hf_proj_type"] or "mlp"
    if pooler not in _POOLS or (kind == "roberta" and pooler == "cls_pooler"):
        raise CheckpointError(
            f"{where}: text_cfg.hf_pooler_type is {show(pooler)}: of {name} vlm reads mean_pooler "
            "and cls_last_hidden_state_pooler"
        )
    if proj not in ("mlp", "linear"):
        raise CheckpointError(
            f"{where}: text_cfg.hf_proj_type is {show(proj)}: vlm reads mlp and linear"
        )
    common = {
        "heads": count,
        "pool": _POOLS[pooler],
        "pad_id": PAD_ID,
        "projection": proj,
        "norm_eps": 1e-5,
    }
    try:
        if kind == "roberta":
            vocab_size, width = shapes[_ROBERTA]
            return TextConfig(
                vocab_size=vocab_size,
                context_length=shapes[_POSITION][0] - _FIRST,
                width=width,
                depth=_count(shapes, f"{_ROOT}.encoder.layer.{{}}.output.dense.weight"),
                mlp_dim=shapes[f"{_ROOT}.encoder.layer.0.intermediate.dense.weight"][0],
                norm="post",
                activation="gelu",
                **common,
            )
        vocab_size, width = shapes[_NLLB]
        return TextConfig(
            vocab_size=vocab_size,
            context_length=_NLLB_LENGTH,
            width=width,
            depth=_count(shapes, f"{_ROOT}.layers.{{}}.fc1.weight"),
            mlp_dim=shapes[f"{_ROOT}.layers.0.fc1.weight"][0],
            activation="relu",
            **common,
        )
    except (KeyError, ValueError):
        raise CheckpointError(
            f"{where}: the text tower's weights are not those of {show(name)}"
        ) from None


def _count(shapes: Shapes, pattern: str) -> int:
    number = 0
    while pattern.format(number) in shapes:
        number += 1
    return number


def reads(shapes: Shapes) -> bool:
    """Whether tensors of these names hold one of these towers."""
    return _ROBERTA in shapes or _NLLB in shapes


# ------------------------------------------------------------------ tables as ours are


@dataclass(frozen=True)
class _Table:
    """A table of theirs made of others: its shape, and its rows `start:stop`."""

    shape: tuple[int, int]
    rows: Callable[[int, int], np.ndarray]


class Folded:
    """The tensors of such a tower, with everything folded in that our tables have in them."""

    def __init__(self, tensors: Tensors, config: TextConfig):
        self.where = tensors.where
        self._tensors = tensors
        length, width = config.context_length, config.width
        if _ROBERTA in tensors.shapes:
            if tuple(tensors.shapes.get(_SEGMENT, ()))[1:] != (width,):
                raise CheckpointError(
                    f"{tensors.where} has no {_SEGMENT} of width {width}: download it again"
                )
            self._made = {_POSITION: _Table((length, width), self._roberta_positions)}
            used = {_SEGMENT}
        else:
            sizes = config.vocab_size, width
            scale = np.float32(math.sqrt(width))
            self._made = {
                _NLLB: _Table(sizes, lambda start, stop: self._rows(_NLLB, start, stop) * scale),
                _SINUSOIDS: _Table(
                    (length, width),
                    lambda start, stop: sinusoids(_FIRST + length, width)[_FIRST:][start:stop],
                ),
            }
            used = set()
        self.shapes = {name: s for name, s in tensors.shapes.items() if name not in used}
        self.shapes |= {name: table.shape for name, table in self._made.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "..."]:
        if name in self._made:
            return self._made[name].rows(start, self.shapes[name][0] if stop is None else stop)
        return self._tensors.read(name, start, stop)

    def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._tensors.read(name, start, stop).astype(np.float32)

    def _roberta_positions(self, start: int, stop: int) -> np.ndarray:
        segment = self._rows(_SEGMENT, 0, 1)
        return self._rows(_POSITION, start + _FIRST, stop + _FIRST) + segment


# --------------------------------------------------------------------- their names and ours

_OURS = "text.transformer.blocks"


def rules(c: TextConfig) -> list[Rule]:
    """The table of a tower, for tensors that are `Folded`."""
    table = _roberta_rules() if c.norm == "post" else _nllb_rules()
    if c.projection == "mlp":
        table += linear("text.proj.0", "text.projection.up", bias=False)
        table += linear("text.proj.2", "text.projection.down", bias=False)
    else:
        table += linear("text.proj", "text.projection", bias=False)
    return table


def _roberta_rules() -> list[Rule]:
    layer, attention = f"{_ROOT}.encoder.layer.{{}}", f"{_ROOT}.encoder.layer.{{}}.attention"
    return [
        Rule(_ROBERTA, "text.embedding"),
        Rule(_POSITION, "text.position"),
        *norm(f"{_ROOT}.embeddings.LayerNorm", "text.embedding_norm"),
        *heads(f"{attention}.self.query", f"{_OURS}.attention.query"),
        *heads(f"{attention}.self.key", f"{_OURS}.attention.key"),
        *heads(f"{attention}.self.value", f"{_OURS}.attention.value"),
        *out(f"{attention}.output.dense", f"{_OURS}.attention.out"),
        *norm(f"{attention}.output.LayerNorm", f"{_OURS}.attention_norm"),
        *linear(f"{layer}.intermediate.dense", f"{_OURS}.mlp.up"),
        *linear(f"{layer}.output.dense", f"{_OURS}.mlp.down"),
        *norm(f"{layer}.output.LayerNorm", f"{_OURS}.mlp_norm"),
    ]


def _nllb_rules() -> list[Rule]:
    layer, attention = f"{_ROOT}.layers.{{}}", f"{_ROOT}.layers.{{}}.self_attn"
    return [
        Rule(_NLLB, "text.embedding"),
        Rule(_SINUSOIDS, "text.position"),
        *norm(f"{layer}.self_attn_layer_norm", f"{_OURS}.attention_norm"),
        *heads(f"{attention}.q_proj", f"{_OURS}.attention.query"),
        *heads(f"{attention}.k_proj", f"{_OURS}.attention.key"),
        *heads(f"{attention}.v_proj", f"{_OURS}.attention.value"),
        *out(f"{attention}.out_proj", f"{_OURS}.attention.out"),
        *norm(f"{layer}.final_layer_norm", f"{_OURS}.mlp_norm"),
        *linear(f"{layer}.fc1", f"{_OURS}.mlp.up"),
        *linear(f"{layer}.fc2", f"{_OURS}.mlp.down"),
        *norm(f"{_ROOT}.layer_norm", "text.norm"),
    ]


def ignored(name: str) -> bool:
    """Buffers of older versions that hold nothing learned."""
    return name.startswith(f"{_ROOT}.") and name.endswith(
        (".position_ids", ".token_type_ids", "embed_positions.weights")
    )
