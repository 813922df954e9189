"""Is a heat map true? Take away what it names, or show that alone, and see what the model says.

Deletion and insertion curves (Petsiuk et al., 2018, arXiv:1806.07421): what a map calls the most
important goes first. A true map makes the first curve fall early and the second one rise early.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageFilter

STEPS = 8  # shares of the pixels at which the curves are taken, beside none and all
BLUR = 1 / 8  # of the image's side: radius of the blur that insertion starts from


class Faithfulness(NamedTuple):
    """Areas under n images' curves: deletion (small is good) and insertion (large is good)."""

    deletion: Float[np.ndarray, " n"]
    insertion: Float[np.ndarray, " n"]


def faithfulness(
    model: Any,
    pixels: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    heats: Sequence[Float[np.ndarray, "_ _"]],
    z_texts: Float[np.ndarray, "m d"],
    right: Int[np.ndarray, " n"],
    batch_size: int = 128,
) -> Faithfulness:
    """The areas under the curves of heat maps, by the probability of the right text among m.

    Args:
        model: what `vlm.load` gives.
        pixels: of each image, as `model.preprocess.pixels` makes them.
        heats: of each image, for these pixels; of equal ones the upper left comes first.
        z_texts: embeddings of the texts that the model chooses among.
        right: which of them is each image's.
        batch_size: images that are encoded at once.

    What is deleted becomes the image's mean colour; insertion begins with the image blurred.

    Example:
        >>> pixels = [model.preprocess.pixels(picture) for picture in pictures]
        >>> heats = [np.random.default_rng(0).random((16, 16), np.float32)] * 3
        >>> z_text = model.encode_text(["red", "green", "blue"])
        >>> from vlm.explain import faithfulness
        >>> found = faithfulness(model, pixels, heats, z_text, np.arange(3))
        >>> found.deletion.shape, found.insertion.shape
        ((3,), (3,))
    """
    shown: list[np.ndarray] = []
    for image, heat in zip(pixels, heats, strict=True):
        shown += _changed(image, heat)
    count = 2 * (STEPS + 1)
    z = _encode(model, shown, batch_size)
    logits = model.logit_scale * (z @ z_texts.T)
    target = np.repeat(np.asarray(right), count)
    shifted = logits - logits.max(1, keepdims=True)
    chance = np.exp(shifted[np.arange(len(z)), target]) / np.exp(shifted).sum(1)
    curves = chance.reshape(len(pixels), 2, STEPS + 1)
    area = (curves[..., 1:] + curves[..., :-1]).mean(-1) / 2
    return Faithfulness(area[:, 0], area[:, 1])


def _changed(image: np.ndarray, heat: np.ndarray) -> list[np.ndarray]:
    """The images of both curves: with more and more deleted, then with more and more inserted."""
    order = np.argsort(-heat.reshape(-1), kind="stable")
    rank = np.empty(len(order), int)
    rank[order] = np.arange(len(order))
    rank = rank.reshape(heat.shape)[..., None]
    mean = np.broadcast_to(image.mean((0, 1)).astype(np.uint8), image.shape)
    radius = BLUR * max(image.shape[:2])
    blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))
    cuts = [round(step / STEPS * len(order)) for step in range(STEPS + 1)]
    deleted = [np.where(rank < cut, mean, image) for cut in cuts]
    return deleted + [np.where(rank < cut, image, blurred) for cut in cuts]


def _encode(model: Any, images: list[np.ndarray], batch_size: int) -> Float[np.ndarray, "n d"]:
    graph, state = nnx.split(model.model)
    parts = []
    for start in range(0, len(images), batch_size):
        rows = images[start : start + batch_size]
        full = rows + [rows[-1]] * (batch_size - len(rows))  # one shape to compile
        batch = model.preprocess.normalize(model.preprocess.collate(full))
        parts.append(np.asarray(_program(graph, state, batch))[: len(rows)])
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnames="graph")
def _program(graph, state, images) -> jax.Array:
    return nnx.merge(graph, state).encode_image(jax.tree.map(jnp.asarray, images))
