"""Position embeddings that are not learned."""

import math

import numpy as np
from jaxtyping import Float32


def sinusoids(count: int, width: int) -> Float32[np.ndarray, "count width"]:
    """Sines in the first half of the channels and cosines in the second, as tensor2tensor has them.

    (Vaswani et al., 2017, arXiv:1706.03762, which has them in turn; fairseq and praxis follow.)

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
