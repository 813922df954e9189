"""Evaluation by several processes: each embeds a part, and all get all embeddings."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float

from vlm.heads.encoder import Encoder, Rule

ROWS = 256  # consecutive images or texts for one process


def distributed(model: Encoder) -> Encoder:
    """Return the model, in a run of several processes with distributed encoding.

    All processes must measure the same tasks on the same data, and get the same results. Each reads
    all images, to hash them, and embeds a part.
    """
    return model if jax.process_count() == 1 else DistributedModel(model)


class DistributedModel:
    """A model whose images and texts are embedded by all processes of the run.

    With several vectors of an image (BLIP-2), each process embeds all images.
    """

    def __init__(self, model: Encoder):
        self._model, self.name = model, model.name
        self.loss: Rule = model.loss
        self.logit_scale, self.logit_bias = model.logit_scale, model.logit_bias

    @property
    def bundle(self) -> Any:
        """The bundle behind the model, or a user's own model."""
        return getattr(self._model, "bundle", self._model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode_image(
        self, images: Iterable[Any], batch_size: int | None = None
    ) -> Float[np.ndarray, "n d"]:
        """Return unit-norm embeddings of a stream of images, in all processes."""
        options = {} if batch_size is None else {"batch_size": batch_size}
        return self._gathered(images, lambda own: self._model.encode_image(own, **options))

    def encode_text(self, texts: list[str]) -> Float[np.ndarray, "n d"]:
        """Return unit-norm embeddings of texts, in all processes."""
        return self._gathered(texts, lambda own: self._model.encode_text(list(own)))

    def _gathered(self, items: Iterable[Any], encode) -> np.ndarray:
        count, me, processes = 0, jax.process_index(), jax.process_count()

        def own() -> Iterator[Any]:
            nonlocal count
            for item in items:
                if count // ROWS % processes == me:
                    yield item
                count += 1

        z = np.asarray(encode(own()), np.float32)
        rounds = -(-count // (ROWS * processes))
        padded = np.zeros((rounds * ROWS, z.shape[1]), np.float32)
        padded[: len(z)] = z
        parts = multihost_utils.process_allgather(padded)  # (processes, rounds * ROWS, d)
        rows = parts.reshape(processes, rounds, ROWS, -1).swapaxes(0, 1).reshape(-1, z.shape[1])
        return rows[:count]
