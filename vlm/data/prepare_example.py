"""Preparation of one example: filters, resizing, and the signatures that find duplicates."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from vlm.config import DataConfig
from vlm.data.examples import Example, captions_of, label_of, passes
from vlm.data.faults import BadSample
from vlm.data.members import TEXT
from vlm.data.near_duplicates import Signatures, signatures_of
from vlm.data.quality_filters import caption_fault, size_fault
from vlm.data.scores import scored
from vlm.data.transform_example import open_image_of
from vlm.inputs.opening import extension_of
from vlm.inputs.preprocess import Preprocess
from vlm.paths import as_path


@dataclass(frozen=True)
class Preparation:
    """Settings of a preparation: see the options of `vlm data prepare`."""

    form: Literal["tar", "array_record", "clip_benchmark"] = "tar"
    examples: int = 10_000  # of a shard
    short_side: int | None = None  # pixels; larger images are resized; None keeps the files
    quality: int = 92  # of resized JPEG files
    deduplicate: bool = False  # skip images that equal an earlier one
    min_side: int = 0  # pixels; smaller images are skipped
    max_aspect: float | None = None  # long side divided by short side
    min_words: int = 0  # of a caption
    min_characters: int = 0
    max_characters: int | None = None
    languages: tuple[str, ...] = ()  # of captions; empty: all
    language_model: str | None = None  # file of a fastText model; None: lid.176
    near_duplicates: int | None = None  # bits in which perceptual hashes may differ
    max_similarity: float | None = None  # cosine of embeddings, from which images are duplicates
    against: str | None = None  # evaluation set, whose images are skipped
    against_split: str = "test"
    against_image: str = "image"

    @property
    def compares_images(self) -> bool:
        """Whether images are compared with each other."""
        return self.deduplicate or None is not self.near_duplicates or bool(self.max_similarity)


@runtime_checkable
class Embedder(Protocol):
    """Embeddings of images in batches: `vlm.heads.similar_images.ImageEmbedder`."""

    batch_size: int
    identity: str

    def pixels(self, image: Image.Image) -> np.ndarray: ...

    def embed(self, pixels: Sequence[np.ndarray]) -> list[bytes]: ...

    def index(self) -> Any: ...


class PreparedExample(NamedTuple):
    """An example to be written."""

    image: bytes
    suffix: str
    features: dict[str, Any]
    captions: list[str]
    text: str  # the caption for readers of one caption
    label: str | None
    signatures: Signatures
    dropped: tuple[str, ...] = ()  # features that the shard format does not support
    pixels: np.ndarray | None = None  # input of the embedder


def make(
    example: Example | BadSample,
    config: DataConfig,
    wanted: Preparation,
    preprocess: Preprocess,
    embedder: Embedder | None = None,
) -> PreparedExample | BadSample:
    """Prepare an example for writing; a `BadSample` means that it is skipped."""
    if isinstance(example, BadSample):
        return example
    try:
        if not passes(scored(example, config), config.filters):
            return BadSample("filtered", "", "rejected by data.filters")
        captions = captions_of(example, config)
        if (fault := caption_fault(captions, wanted)) is not None:
            return fault
        image = open_image_of(example, config, preprocess, "an example")
    except BadSample as fault:
        return fault
    if (fault := size_fault(*image.size, wanted)) is not None:
        return fault
    data = example[config.image]
    if wanted.short_side is not None and min(image.size) > wanted.short_side:
        scale = wanted.short_side / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        smaller = image.resize(size, Image.Resampling.LANCZOS)
        data, suffix = _encoded(smaller, "JPEG", quality=wanted.quality), "jpg"
    elif isinstance(data, bytes | str | os.PathLike):
        data = data if isinstance(data, bytes) else as_path(data).read_bytes()
        suffix = extension_of(data)
    else:  # an image or array of Python
        data, suffix = _encoded(image, "PNG"), "png"
    plain = {
        name: _plain(value)
        for name, value in example.items()
        if name != config.image and not name.startswith("\0")
    }
    features = {name: value for name, value in plain.items() if _fits(value, wanted)}
    dropped = tuple(name for name, value in plain.items() if name not in features)
    text = str(features[TEXT]) if TEXT in config.captions and features.get(TEXT) else captions[0]
    label = label_of(example, config) if config.label else None
    signatures = signatures_of(image, wanted.deduplicate, wanted.near_duplicates is not None)
    pixels = None if embedder is None else embedder.pixels(image)
    return PreparedExample(
        data, suffix, features, captions, text, label, signatures, dropped, pixels
    )


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _plain(value: Any) -> Any:
    """Convert a NumPy value to Python."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _fits(value: Any, wanted: Preparation) -> bool:
    """Whether the format supports a value: tar any JSON; ArrayRecord texts, numbers, flat lists."""
    if value is None or isinstance(value, str | int | float):  # bool is an int
        return True
    if isinstance(value, list | tuple):
        flat = wanted.form == "tar" or not any(isinstance(v, list | tuple) for v in value)
        return flat and all(_fits(v, wanted) for v in value)
    return wanted.form == "tar" and isinstance(value, dict) and _fits([*value.values()], wanted)
