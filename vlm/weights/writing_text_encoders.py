"""Text towers of transformers inside open_clip folders, written by the names of their encoders.

open_clip makes such a tower from the Hub's configuration of that name, whose sizes must then be the
model's. What reading folds into our tables is written so that it adds nothing: a segment of zeros,
NLLB's factor divided out. Places behind the model's own are zeros, and no text of its length sees
them.
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
)
from vlm.weights.writing_parts import refuse

_FREE = ("context_length", "pool", "projection", "end_id", "dropout")  # that open_clip sets itself
_SAME_SINUSOID = 1e-4  # what another machine's sines of large angles may differ by


def text_cfg(c: TextConfig) -> dict[str, Any]:
    """The `text_cfg` of such a tower, but for its tokenizer.

    Raises:
        CheckpointError: the tower is no encoder that open_clip has, or ends otherwise.
    """
    name = encoder_name(c)
    cls = "cls_last_hidden_state_pooler" if c.norm == "post" else "cls_pooler"
    poolers = {"mean": "mean_pooler", "first": cls}
    faults = []
    if c.pool not in poolers:
        faults.append(f"text.pool {c.pool!r} (mean or first)")
    if c.projection not in ("mlp", "linear"):
        faults.append(f"text.projection {c.projection!r} (mlp or linear)")
    if faults:
        refuse("open_clip", faults)
    return {
        "hf_model_name": name,
        "hf_model_pretrained": False,
        "hf_proj_type": c.projection,
        "hf_pooler_type": poolers[c.pool],
        "context_length": c.context_length,
    }


def encoder_name(c: TextConfig) -> str:
    """The name of the encoder that is exactly this one.

    Raises:
        CheckpointError: there is none; the message says how the nearest one differs.
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
    """The tensors of a model with such a tower, by the `table` that reads them.

    Raises:
        CheckpointError: the tower's positions were trained, where the encoder computes its own.
    """
    c = model.config.text
    if c.norm == "post":
        places = FIRST + ENCODERS[encoder_name(c)].context_length
        yield from write(model, _with(table, POSITION, _placed(places)))
        yield SEGMENT, np.zeros((1, c.width), model.text.embedding[...].dtype)
    else:
        _check_sinusoids(model)
        table = [rule for rule in table if rule.theirs != SINUSOIDS]  # which hold no parameters
        yield from write(model, _with(table, NLLB_EMBEDDING, _divided(math.sqrt(c.width))))


def _with(table: Sequence[Rule], theirs: str, transform: Transform) -> list[Rule]:
    return [
        dataclasses.replace(rule, transform=transform) if rule.theirs == theirs else rule
        for rule in table
    ]


def _placed(places: int) -> Transform:
    """Theirs begins behind the padding's place, and goes on behind ours."""
    return Transform(
        lambda s: (places, s[1]),
        lambda x, s: x[FIRST : FIRST + s[0]],
        lambda x: np.pad(x, ((FIRST, places - FIRST - len(x)), (0, 0))),
    )


def _divided(factor: float) -> Transform:
    """Theirs times a factor: 32 of NLLB's 1024 channels, by which nothing is rounded."""
    scale = np.float32(factor)
    return Transform(
        lambda s: s,
        lambda x, s: x.astype(np.float32) * scale,
        lambda x: (x.astype(np.float32) / scale).astype(x.dtype),
    )


def _check_sinusoids(model: DualEncoder) -> None:
    """Refuse positions other than those that NLLB's encoder computes."""
    c = model.config.text
    assert model.text.position is not None  # NLLB's are a table here
    ours = np.asarray(model.text.position[...])
    theirs = sinusoids(FIRST + c.context_length, c.width)[FIRST:].astype(ours.dtype)
    far = np.abs(ours.astype(np.float32) - theirs.astype(np.float32)).max()
    if far > max(_SAME_SINUSOID, float(jnp.finfo(ours.dtype).eps)):
        refuse("open_clip", [f"the trained text.position of {encoder_name(c)} (its sinusoids)"])
