"""Sinusoidal position embeddings."""

import math

import numpy as np
from jaxtyping import Float32


def sinusoids(count: int, width: int) -> Float32[np.ndarray, "count width"]:
    """Position table with sines in the first half of the channels and cosines in the second.

    This is the layout of tensor2tensor, fairseq and praxis; arXiv:1706.03762 interleaves them.

    Example:
        >>> from vlm.nn.positions import sinusoids
        >>> sinusoids(2, 4)[0].tolist()
        [0.0, 0.0, 1.0, 1.0]
    """
    half = width // 2
    step = np.float32(-math.log(10_000) / max(half - 1, 1))
    angles = np.arange(count, dtype=np.float32)[:, None] * np.exp(
        np.arange(half, dtype=np.float32) * step
    )
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return np.pad(table, ((0, 0), (0, width % 2))).astype(np.float32)
