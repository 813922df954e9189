"""A model as heads take it, with videos in place of images."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float32

from vlm.bundle import Bundle
from vlm.heads.encoder import Rule
from vlm.inputs.opening import OnError
from vlm.video import frames_of, has_prompts


class VideoEncoder:
    """A model whose `encode_image` takes videos, for zero-shot and few-shot heads and indexes.

    Args:
        model: a model from `vlm.load`.
        frames: number of frames of each video: see `Bundle.encode_video`.

    Raises:
        ConfigError: a number of frames that the model does not take.

    Example:
        >>> videos = vlm.heads.VideoEncoder(model, frames=2)
        >>> classify = vlm.ZeroShotClassifier(videos, ["cat", "dog"])
        >>> len(classify(pictures).top(1))  # one video of three frames
        1
    """

    def __init__(self, model: Bundle, frames: int | None = None):
        self.bundle = model
        self.frames = frames_of(model, frames)
        self.name, self.templates = model.name, model.templates
        self.loss: Rule = model.loss
        self.logit_scale, self.logit_bias = model.logit_scale, model.logit_bias
        self.fingerprint, self.source = model.fingerprint, model.source
        self.preprocess, self.embed_dim = model.preprocess, model.embed_dim
        self.prompts_by_video = has_prompts(model)

    def encode_image(
        self,
        images: Iterable[Any],
        batch_size: int | None = None,
        *,
        on_error: OnError | None = None,
    ) -> Float32[np.ndarray, "n d"]:
        """Encode videos with `Bundle.encode_video`."""
        return self.bundle.encode_video(images, batch_size, frames=self.frames, on_error=on_error)

    def with_prompt(self, prompt: str | None) -> "VideoEncoder":
        """Copy it with another default prompt: see `Bundle.with_prompt`."""
        return VideoEncoder(self.bundle.with_prompt(prompt), self.frames)

    def encode_text(
        self, texts: str | Iterable[str], batch_size: int | None = None
    ) -> Float32[np.ndarray, "m d"]:
        """Encode texts with `Bundle.encode_text`."""
        return self.bundle.encode_text(texts, batch_size)
