"""Several vectors for each image or text: one for each patch, and one for each token.

They are for late interaction (`vlm.heads.MultiVectorIndex`), as in FILIP (arXiv:2111.07783): each
position passes through the pooling and projection of its tower alone. A Q-Former (BLIP-2) makes
several vectors of an image by itself, which were trained to be compared with one of a text.
"""

import functools
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from vlm.bundle import Bundle
from vlm.errors import ConfigError
from vlm.heads.encoder import Encoder
from vlm.inputs.batches import batch_size_of, pixel_batches
from vlm.inputs.opening import ImageLike, OnError, one_or_many
from vlm.nn.naflex import Patches
from vlm.sharding import place_padded
from vlm.weights.instantiate import check_images, check_tower

Vectors = Float[np.ndarray, "_ d"]


def multi_vector_bundle(model: Any) -> Bundle | None:
    """Return the bundle behind a model of several vectors of an image (BLIP-2); None for others."""
    bundle = getattr(model, "bundle", model)  # wrappers, such as DistributedModel, have a bundle
    return bundle if isinstance(bundle, Bundle) and bundle.config.vision.vectors > 1 else None


def image_vectors(
    model: Encoder, images: Iterable[ImageLike], **options: Any
) -> Float[np.ndarray, "n *v d"]:
    """Encode images; a model of several vectors of an image (BLIP-2) gives all of each.

    Options are those of `Encoder.encode_image`.
    """
    if (bundle := multi_vector_bundle(model)) is None:
        return np.asarray(model.encode_image(images, **options), np.float32)
    found = np.asarray(image_tokens(bundle, images, **options), np.float32)
    return found.reshape(-1, bundle.config.vision.vectors, bundle.embed_dim)


def image_tokens(
    model: Bundle,
    images: ImageLike | Iterable[ImageLike],
    batch_size: int | None = None,
    *,
    on_error: OnError | None = None,
) -> list[Vectors]:
    """Compute unit-norm vectors of the patches of each image, in row-major order.

    Padding of NaFlex is left out. With a Q-Former they are those of its queries. Arguments are
    those of `Bundle.encode_image`.

    Raises:
        ConfigError: a model without a vision tower, or a tower without `dense`.
        DataError: an unreadable image, without `on_error`.

    Example:
        >>> [z.shape for z in vlm.heads.image_tokens(model, pictures[:2])]
        [(4, 16), (4, 16)]
    """
    check_images(model.model, model.name, multi_vector=True)
    graph, state = _split(model, "vision")
    size, found = batch_size_of(batch_size), []
    for rows in pixel_batches(model.preprocess, one_or_many(images), size, on_error):
        masks = rows.mask if isinstance(rows, Patches) else itertools.repeat(slice(None))
        count = len(rows.mask if isinstance(rows, Patches) else rows)
        padded = place_padded(rows, count, size, None)  # few shapes to compile for
        z = np.asarray(_dense(graph, state, "vision", model.preprocess.normalize(padded)))[:count]
        found += [vectors[mask] for vectors, mask in zip(z, masks, strict=False)]
    return found


def text_tokens(
    model: Bundle,
    texts: str | Iterable[str],
    batch_size: int | None = None,
    *,
    prompt: str | None = None,
) -> list[Vectors]:
    """Compute unit-norm vectors of the tokens of each text, with begin and end, without padding.

    Arguments are those of `Bundle.encode_text`.

    Raises:
        ConfigError: a model without a text tower, or a tower without `dense`.
        DataError: a text is not a string.

    Example:
        >>> [z.shape[1] for z in vlm.heads.text_tokens(model, ["a red square"])]
        [16]
    """
    check_tower(model.model, "text", model.name)
    graph, state = _split(model, "text")
    size, found, rules = batch_size_of(batch_size), [], model.tokenizer.config
    stream = iter([texts] if isinstance(texts, str) else texts)
    while part := list(itertools.islice(stream, size)):
        rows = model.tokenizer(part, prompt)
        z = np.asarray(_dense(graph, state, "text", place_padded(rows, len(part), size, None)))
        lengths = np.minimum(model.tokenizer.lengths(part, prompt), rules.context_length)
        for vectors, length in zip(z, lengths, strict=False):
            kept = (
                slice(length) if rules.pad_side == "right" else slice(len(vectors) - length, None)
            )
            found.append(vectors[kept])
    return found


def _split(model: Bundle, name: str):
    if not hasattr(getattr(model.model, name), "dense"):
        raise ConfigError(
            f"the {name} tower of {model.name} gives one vector for each input: late interaction "
            "needs a tower with a method dense, as the ViTs and text transformers of vlm"
        )
    return nnx.split(model.model)


@functools.partial(jax.jit, static_argnames=("graph", "name"))
def _dense(graph, state, name, inputs):
    return nnx.merge(graph, state).dense(name, inputs)
