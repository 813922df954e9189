"""Deletion and insertion curves: the faithfulness of a heat map.

Pixels are deleted or inserted in order of their heat (Petsiuk et al., 2018, arXiv:1806.07421). With
a faithful map, the score drops early under deletion and rises early under insertion.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageFilter

from vlm.bundle import Bundle

STEPS = 8  # intervals of a curve, from no pixels to all
BLUR = 1 / 8  # of the image's side: radius of the blur at the start of insertion


class Faithfulness(NamedTuple):
    """Areas under n images' curves: deletion (lower is better), insertion (higher is better)."""

    deletion: Float[np.ndarray, " n"]
    insertion: Float[np.ndarray, " n"]


def faithfulness(
    model: Bundle,
    pixels: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    heats: Sequence[Float[np.ndarray, "_ _"]],
    z_texts: Float[np.ndarray, "m d"],
    right: Int[np.ndarray, " n"],
    batch_size: int = 128,
) -> Faithfulness:
    """Compute the areas under the deletion and insertion curves of heat maps.

    The score is the probability of the correct text among m texts. Deleted pixels get the image's
    mean colour; insertion starts from the blurred image.

    Args:
        model: a model from `vlm.load`.
        pixels: of each image, from `model.preprocess.pixels`.
        heats: heat maps of these pixels; ties are broken in row-major order.
        z_texts: embeddings of the candidate texts.
        right: index of the correct text of each image.
        batch_size: images per batch.

    Example:
        >>> pixels = [model.preprocess.pixels(picture) for picture in pictures]
        >>> heats = [np.random.default_rng(0).random((16, 16), np.float32)] * 3
        >>> z_text = model.encode_text(["red", "green", "blue"])
        >>> from vlm.explanation import faithfulness
        >>> result = faithfulness(model, pixels, heats, z_text, np.arange(3))
        >>> result.deletion.shape, result.insertion.shape
        ((3,), (3,))
    """
    perturbed: list[np.ndarray] = []
    for image, heat in zip(pixels, heats, strict=True):
        perturbed += _perturb(image, heat)
    count = 2 * (STEPS + 1)
    z = _encode(model, perturbed, batch_size)
    logits = model.logit_scale * (z @ z_texts.T)
    target = np.repeat(np.asarray(right), count)
    shifted = logits - logits.max(1, keepdims=True)
    probability = np.exp(shifted[np.arange(len(z)), target]) / np.exp(shifted).sum(1)
    curves = probability.reshape(len(pixels), 2, STEPS + 1)
    area = (curves[..., 1:] + curves[..., :-1]).mean(-1) / 2
    return Faithfulness(area[:, 0], area[:, 1])


def _perturb(image: np.ndarray, heat: np.ndarray) -> list[np.ndarray]:
    """Return the images of the deletion curve, then those of the insertion curve."""
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


def _encode(model: Bundle, images: list[np.ndarray], batch_size: int) -> Float[np.ndarray, "n d"]:
    parts = []
    for start in range(0, len(images), batch_size):
        rows = images[start : start + batch_size]
        full = rows + [rows[-1]] * (batch_size - len(rows))  # one compiled shape
        parts.append(model.encode_pixels(model.preprocess.collate(full))[: len(rows)])
    return np.concatenate(parts)
