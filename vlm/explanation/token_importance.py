"""Importance of each text token for the similarity to an image, by leave-one-out."""

import functools

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from vlm.bundle import Bundle


def token_importance(
    model: Bundle, text: str, z_image: Float[np.ndarray, " d"]
) -> tuple[tuple[str, float], ...]:
    """Compute the drop of the cosine with `z_image` without each token of `text`.

    A negative number means that the text matches better without the token (erasure, Li et al.,
    2016, arXiv:1612.08220). It works for every text tower.
    """
    config = model.tokenizer.config
    (row,) = model.tokenizer([text])
    specials = {config.pad_id, config.bos_id, config.eos_id}
    positions = [i for i, token in enumerate(row.tolist()) if token not in specials]
    rows = [row]
    for i in positions:
        rest, pad = np.delete(row, i), [config.pad_id]
        rows.append(np.concatenate([rest, pad] if config.pad_side == "right" else [pad, rest]))
    padded = rows + [row] * (
        (1 << len(positions).bit_length()) - len(rows)
    )  # limits the number of compiled shapes
    graph, state = nnx.split(model.model)
    z = _encode(graph, state, np.stack(padded).astype(np.int32))
    cosines = np.asarray(z)[: len(rows)] @ z_image
    names = [model.tokenizer.decode([row[i : i + 1]])[0] for i in positions]
    drops = cosines[0] - cosines[1:]
    return tuple((name, float(drop)) for name, drop in zip(names, drops, strict=True))


@functools.partial(jax.jit, static_argnames="graph")
def _encode(graph, state, tokens) -> jax.Array:
    return nnx.merge(graph, state).encode_text(tokens)
