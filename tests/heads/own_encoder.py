"""Typed example of a user's own model, for pyright: see test_encoder.py."""

from collections.abc import Iterable
from typing import Literal

import numpy as np

import vlm
from vlm.inputs.opening import ImageLike


class MeanColour:
    """Model of a user's own: the interface of `vlm.heads.Encoder`, without inheriting from it."""

    name = "mean colour"
    loss: Literal["softmax", "sigmoid"] = "softmax"
    logit_scale, logit_bias = 10.0, 0.0
    fingerprint = "1"

    def encode_image(self, images: Iterable[ImageLike], batch_size: int = 32) -> np.ndarray:
        rows = [np.asarray(image, np.float32).mean((0, 1)) for image in images]
        return np.stack([row / np.linalg.norm(row) for row in rows])

    def encode_text(self, texts: list[str]) -> np.ndarray:
        return np.eye(3, dtype=np.float32)[[("red", "green", "blue").index(t) for t in texts]]


def classify(images: list[np.ndarray]) -> list[str]:
    """Use a user's own model in heads, as they are typed."""
    model = MeanColour()
    encoder: vlm.heads.Encoder = model
    index = vlm.RetrievalIndex(encoder)
    index.add(images, ids=range(len(images)))
    index.search("red", k=1)
    index.search([vlm.Query("red") + vlm.Query(images[0])], k=1)
    vlm.FewShotClassifier.fit(model, images, ["a", "b"], "mean")
    found = vlm.ZeroShotClassifier(model, ["red", "green"], ["{}"])(images)
    return [row[0][0] for row in found.top(1)]
