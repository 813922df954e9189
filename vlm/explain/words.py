"""Which tokens of a text its likeness to an image hangs on."""

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float


def token_importance(
    model: Any, text: str, z_image: Float[np.ndarray, " d"]
) -> tuple[tuple[str, float], ...]:
    """For each token of `text` how much the cosine with `z_image` falls where it is left out.

    A negative number: the text fits better without the token. Every text tower is asked the same
    way, with the rows of tokens that it would have been given (Li et al., 2016, arXiv:1612.08220).
    """
    config = model.tokenizer.config
    (row,) = model.tokenizer([text])
    specials = {config.pad_id, config.bos_id, config.eos_id}
    at = [i for i, token in enumerate(row.tolist()) if token not in specials]
    rows = [row]
    for i in at:
        rest, pad = np.delete(row, i), [config.pad_id]
        rows.append(np.concatenate([rest, pad] if config.pad_side == "right" else [pad, rest]))
    padded = rows + [row] * ((1 << len(at).bit_length()) - len(rows))  # few shapes to compile
    graph, state = nnx.split(model.model)
    z = _encode(graph, state, np.stack(padded).astype(np.int32))
    cosines = np.asarray(z)[: len(rows)] @ z_image
    names = [model.tokenizer.decode([row[i : i + 1]])[0] for i in at]
    falls = cosines[0] - cosines[1:]
    return tuple((name, float(fall)) for name, fall in zip(names, falls, strict=True))


@functools.partial(jax.jit, static_argnames="graph")
def _encode(graph, state, tokens) -> jax.Array:
    return nnx.merge(graph, state).encode_text(tokens)
