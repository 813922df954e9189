"""transformers' encoders as text towers of open_clip folders: XLM-RoBERTa, RoBERTa, and NLLB's.

A folder gives the encoder's name alone, whose sizes its weights say, but for the heads. What
depends on no parameter of ours is folded into the tables as they are read: RoBERTa's one segment,
its first position (positions are counted from the padding's id), and NLLB's factor and sinusoids.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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
FIRST = PAD_ID + 1


def _roberta(vocab_size: int, width: int, depth: int, heads: int) -> TextConfig:
    return TextConfig(
        vocab_size=vocab_size,
        context_length=512,
        width=width,
        depth=depth,
        heads=heads,
        mlp_dim=4 * width,
        pool="mean",
        pad_id=PAD_ID,
        norm="post",
        projection="mlp",
        activation="gelu",
        norm_eps=1e-5,
    )


def _nllb(depth: int, mlp_dim: int) -> TextConfig:
    return TextConfig(
        vocab_size=256_206,
        context_length=1024,
        width=1024,
        depth=depth,
        heads=16,
        mlp_dim=mlp_dim,
        pool="first",
        pad_id=PAD_ID,
        projection="mlp",
        activation="relu",
        norm_eps=1e-5,
    )


# The encoders as the Hub has them, in open_clip's frame where it is told nothing else.
ENCODERS = {
    "roberta-base": _roberta(50_265, 768, 12, 12),
    "roberta-large": _roberta(50_265, 1024, 24, 16),
    "xlm-roberta-base": _roberta(250_002, 768, 12, 12),
    "xlm-roberta-large": _roberta(250_002, 1024, 24, 16),
    "facebook/nllb-200-distilled-600M": _nllb(12, 4096),
    "facebook/nllb-200-distilled-1.3B": _nllb(24, 8192),
}
_POOLS = {"mean_pooler": "mean", "cls_last_hidden_state_pooler": "first", "cls_pooler": "first"}
_ROOT = "text.transformer"
_ROBERTA_EMBEDDING = f"{_ROOT}.embeddings.word_embeddings.weight"
NLLB_EMBEDDING = f"{_ROOT}.embed_tokens.weight"
POSITION = f"{_ROOT}.embeddings.position_embeddings.weight"
SEGMENT = f"{_ROOT}.embeddings.token_type_embeddings.weight"
SINUSOIDS = f"{_ROOT}.embed_positions.weights"

Shapes = Mapping[str, tuple[int, ...]]


def text_config(c: Mapping[str, Any], embed_dim: int, shapes: Shapes, where: str) -> TextConfig:
    """The tower of a `text_cfg` with `hf_model_name`.

    Raises:
        CheckpointError: another encoder, pooler or projection, or the weights of something else.
    """
    name = c["hf_model_name"]
    known = {of_the_hub.split("/")[-1]: encoder for of_the_hub, encoder in ENCODERS.items()}
    encoder = known.get(str(name).split("/")[-1])
    if encoder is None:
        raise CheckpointError(
            f"{where}: the text tower {show(name)} of transformers is not one that vlm reads: it "
            f"reads {', '.join(known)}"
        )
    roberta = encoder.norm == "post"
    pooler = c["hf_pooler_type"] or ("mean_pooler" if roberta else "cls_pooler")
    proj = c["hf_proj_type"] or "mlp"
    if pooler not in _POOLS or (roberta and pooler == "cls_pooler"):
        raise CheckpointError(
            f"{where}: text_cfg.hf_pooler_type is {show(pooler)}: of {name} vlm reads mean_pooler "
            "and cls_last_hidden_state_pooler"
        )
    if proj not in ("mlp", "linear"):
        raise CheckpointError(
            f"{where}: text_cfg.hf_proj_type is {show(proj)}: vlm reads mlp and linear"
        )
    if roberta:
        table, layers = _ROBERTA_EMBEDDING, f"{_ROOT}.encoder.layer.{{}}.intermediate.dense.weight"
    else:
        table, layers = NLLB_EMBEDDING, f"{_ROOT}.layers.{{}}.fc1.weight"
    try:
        vocab_size, width = shapes[table]
        return dataclasses.replace(
            encoder,
            vocab_size=vocab_size,
            context_length=shapes[POSITION][0] - FIRST if roberta else encoder.context_length,
            width=width,
            depth=_count(shapes, layers),
            mlp_dim=shapes[layers.format(0)][0],
            pool=_POOLS[pooler],
            projection=proj,
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
    return _ROBERTA_EMBEDDING in shapes or NLLB_EMBEDDING in shapes


def owns(config: TextConfig) -> bool:
    """Whether a tower is of one of these kinds, of whatever size."""
    return config.pad_id == PAD_ID and (config.norm == "post" or config.activation == "relu")


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
        if _ROBERTA_EMBEDDING in tensors.shapes:
            if tuple(tensors.shapes.get(SEGMENT, ()))[1:] != (width,):
                raise CheckpointError(
                    f"{tensors.where} has no {SEGMENT} of width {width}: download it again"
                )
            self._made = {POSITION: _Table((length, width), self._roberta_positions)}
            used = {SEGMENT}
        else:
            sizes = config.vocab_size, width
            scale = np.float32(math.sqrt(width))
            self._made = {
                NLLB_EMBEDDING: _Table(
                    sizes, lambda start, stop: self._rows(NLLB_EMBEDDING, start, stop) * scale
                ),
                SINUSOIDS: _Table(
                    (length, width),
                    lambda start, stop: sinusoids(FIRST + length, width)[FIRST:][start:stop],
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
        segment = self._rows(SEGMENT, 0, 1)
        return self._rows(POSITION, start + FIRST, stop + FIRST) + segment


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
        Rule(_ROBERTA_EMBEDDING, "text.embedding"),
        Rule(POSITION, "text.position"),
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
        Rule(NLLB_EMBEDDING, "text.embedding"),
        Rule(SINUSOIDS, "text.position"),
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
