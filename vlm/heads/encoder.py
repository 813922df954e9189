"""Interface of the models that heads, evaluations and explanations take."""

from collections.abc import Iterable
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

Rule = Literal["softmax", "sigmoid"]


@runtime_checkable
class Encoder(Protocol):
    """Interface of a model that embeds images and texts, such as those of `vlm.load`.

    Every head takes any object with these members. Three more are optional: `fingerprint`, a hash
    of the weights, saves probes of the model's identity; `templates` are default prompt templates;
    and `encode_image` may take `on_error`, to skip unreadable images.

    Attributes:
        name: name of the model.
        loss: loss that it was trained with, and so the rule from logits to scores: softmax over
            the texts, or independent sigmoids.
        logit_scale, logit_bias: logits are scale * cosine + bias.

    Example:
        >>> isinstance(model, vlm.heads.Encoder)
        True
    """

    @property
    def name(self) -> str: ...

    @property
    def loss(self) -> Rule: ...

    @property
    def logit_scale(self) -> float: ...

    @property
    def logit_bias(self) -> float: ...

    def encode_image(self, images: Iterable[Any], /, *, batch_size: int = ...) -> np.ndarray:
        """Compute (n, d) unit-norm float32 embeddings of a stream of images."""
        ...

    def encode_text(self, texts: list[str], /) -> np.ndarray:
        """Compute (m, d) unit-norm float32 embeddings of texts."""
        ...
