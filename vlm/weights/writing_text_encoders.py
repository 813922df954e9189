"""Export of open_clip text towers that are encoders of transformers.

open_clip builds such a tower from the Hub's config of that name, so the sizes must be equal.
Whatever reading adds to our tables is written such that it adds nothing: a zero token type
embedding, and NLLB's embeddings without their factor. Positions beyond the context length are zero
and never used.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlm.config import TextConfig
from vlm.errors import CheckpointError
from vlm.models.dual_encoder import DualEncoder
from vlm.nn.positions import sinusoids
from vlm.weights.rules import Rule, Transform, write
from vlm.weights.text_encoders import (
    ENCODERS,
    FIRST,
    NLLB_EMBEDDING,
    POSITION,
    SEGMENT,
    SINUSOIDS,
    first_position,
)
from vlm.weights.writing_parts import refuse, refuse_if

_FREE = ("context_length", "pool", "pooler", "projection", "end_id", "dropout")  # set by open_clip
_SAME_SINUSOID = 1e-4  # difference of sines of large angles between machines


def text_cfg(c: TextConfig) -> dict[str, Any]:
    """Return the `text_cfg` of such a tower, without the fields of its tokenizer.

    Raises:
        CheckpointError: open_clip does not support the encoder, its pooling or projection.
    """
    name = encoder_name(c)
    own = c.pooler or c.norm == "pre"
    cls = "cls_pooler" if own else "cls_last_hidden_state_pooler"
    poolers = {"mean": "mean_pooler", "max": "max_pooler", "first": cls}
    projection, projections = c.projection, ("mlp", "linear", "none")
    faults = {
        f"text.pool {c.pool!r} (mean, max or first)": c.pool not in poolers,
        f"text.pooler with text.pool {c.pool!r} (first)": c.pooler and c.pool != "first",
        f"text.projection {projection!r} (mlp, linear or none)": projection not in projections,
    }
    refuse_if("open_clip", faults)
    return {
        "hf_model_name": name,
        "hf_model_pretrained": False,
        "hf_proj_type": None if projection == "none" else projection,
        "hf_pooler_type": poolers[c.pool],
        "context_length": c.context_length,
    }


def encoder_name(c: TextConfig) -> str:
    """Return the name of the encoder with exactly this config.

    Raises:
        CheckpointError: there is none; the message lists the differences to the nearest one.
    """
    found = []
    for name, encoder in ENCODERS.items():
        differ = [
            f"{field} {theirs!r} (not {getattr(c, field)!r})"
            for field, theirs in dataclasses.asdict(encoder).items()
            if field not in _FREE and theirs != getattr(c, field)
        ]
        if c.context_length > encoder.context_length:
            differ.append(f"context_length {encoder.context_length} (not {c.context_length})")
        if not differ:
            return name
        found.append((len(differ), name, differ))
    _, name, differ = min(found, key=lambda item: item[0])
    raise CheckpointError(
        f"none of the text encoders that open_clip takes from transformers is the model's: {name} "
        f"is the nearest and has {', '.join(differ)}: save the model as a vlm bundle instead"
    )


def tensors(model: DualEncoder, table: Sequence[Rule]) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of a model with such a tower, by the `table` that reads them.

    Raises:
        CheckpointError: the tower's positions were trained, but the encoder computes them.
    """
    c = model.config.text_transformer
    if c.norm == "post":
        first = first_position(c)
        places = first + ENCODERS[encoder_name(c)].context_length
        yield from write(model, _with(table, POSITION, _padded(places, first)))
        text: Any = model.text
        yield SEGMENT, np.zeros((1 if first else 2, c.width), text.embedding[...].dtype)
    else:
        _check_sinusoids(model)
        table = [rule for rule in table if rule.theirs != SINUSOIDS]  # they are not parameters
        table = _with(table, NLLB_EMBEDDING, _divided(math.sqrt(c.width)))
        yield from write(model, table, computed=["text.position"])


def _with(table: Sequence[Rule], theirs: str, transform: Transform) -> list[Rule]:
    return [
        dataclasses.replace(rule, transform=transform) if rule.theirs == theirs else rule
        for rule in table
    ]


def _padded(places: int, first: int) -> Transform:
    """Return a transform that adds unused positions before and after ours."""
    return Transform(
        lambda s: (places, s[1]),
        lambda x, s: x[first : first + s[0]],
        lambda x: np.pad(x, ((first, places - first - len(x)), (0, 0))),
    )


def _divided(factor: float) -> Transform:
    """Return a transform by a factor; NLLB's 32, for 1024 channels, is exact."""
    scale = np.float32(factor)
    return Transform(
        lambda s: s,
        lambda x, s: x.astype(np.float32) * scale,
        lambda x: (x.astype(np.float32) / scale).astype(x.dtype),
    )


def _check_sinusoids(model: DualEncoder) -> None:
    """Raise an error unless the positions are those that NLLB's encoder computes."""
    c = model.config.text_transformer
    text: Any = model.text
    assert text.position is not None  # a table for NLLB
    ours = np.asarray(text.position[...])
    theirs = sinusoids(FIRST + c.context_length, c.width)[FIRST:].astype(ours.dtype)
    far = np.abs(ours.astype(np.float32) - theirs.astype(np.float32)).max()
    if far > max(_SAME_SINUSOID, float(jnp.finfo(ours.dtype).eps)):
        refuse("open_clip", [f"the trained text.position of {encoder_name(c)} (its sinusoids)"])
