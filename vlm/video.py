"""`Bundle.encode_video` and `Bundle.video_logits`.

An image model averages the embeddings of uniformly sampled frames, and normalizes the mean again:
CLIP4Clip's parameter-free similarity (Luo et al., 2021, arXiv:2104.08860). Perception Encoder's
`encode_video` is the same mean, up to its length. A video model has a tower that takes all frames.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, UInt8
from PIL import Image

from vlm.config import XCLIPConfig
from vlm.errors import ConfigError
from vlm.inputs.batches import batch_size_of
from vlm.inputs.opening import OnError
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.videos import VideoLike, one_or_many_videos, read_videos
from vlm.models.dual_encoder import unit_norm
from vlm.models.running import run_batches
from vlm.weights.instantiate import check_tower

FRAMES = 8  # of a video, for image models: as many as X-CLIP base takes
_GROUP = 1024  # videos whose frames' embeddings are in memory


def encode_video(
    self: Any,  # a Bundle, which imports this module
    videos: VideoLike | Iterable[VideoLike],
    batch_size: int | None = None,
    *,
    frames: int | None = None,
    on_error: OnError | None = None,
) -> Float32[np.ndarray, "n d"]:
    """Encode videos to unit-norm embeddings: files, lists of frames, or arrays (frames, h, w, 3).

    A list whose first item is an image is one video; any other iterable is several, and is
    streamed. Frames are sampled at equal distances. An image model embeds each, and the embedding
    of the video is their normalized mean (CLIP4Clip, arXiv:2104.08860). A video model takes all
    frames at once. Files need the extra `video` (PyAV).

    Args:
        videos: one or several videos.
        batch_size: of frames for an image model, of videos for a video model. None: 32 for images
            on CPU, else 256; for videos as many as have that many frames.
        frames: number of frames to sample from each video; a shorter one has fewer. None: 8. A
            video model has a fixed number, and a shorter video repeats frames.
        on_error: called with the position and error of each unreadable video, in order; such a
            video has no row. Without it, the first error is raised.

    Raises:
        DataError: a video is missing or unreadable; the message names it.
        ConfigError: a number of frames that a video model does not take.
    """
    check_tower(self.model, "vision", self.name)
    stream = _read(self, videos, frames, on_error)
    if self.config.vision.video_frames is not None:
        size = _videos_at_once(self, batch_size)
        return self._run(self._image_program, _pixels(self.preprocess, stream, size), size)
    size = batch_size_of(batch_size)
    parts = [np.zeros((0, self.embed_dim), np.float32)]
    for first in stream:
        group = itertools.chain([first], itertools.islice(stream, _GROUP - 1))
        parts.append(_frame_means(self, group, size))
    return np.concatenate(parts)


def video_logits(
    self: Any,  # a Bundle
    videos: VideoLike | Iterable[VideoLike],
    texts: str | Iterable[str],
    batch_size: int | None = None,
    *,
    frames: int | None = None,
    on_error: OnError | None = None,
) -> Float32[np.ndarray, "n m"]:
    """Return the logits of n videos over m texts, as the model's own code computes them.

    They are scale * cosine + bias of `encode_video` and `encode_text`. X-CLIP changes the text
    embeddings by the features of each video first (arXiv:2208.02816). `vlm.heads.Classification`
    turns logits into scores.

    Args:
        videos: one or several videos, as for `encode_video`.
        texts: one or several texts.
        batch_size: as for `encode_video`.
        frames: as for `encode_video`.
        on_error: as for `encode_video`.

    Raises:
        DataError: a video is missing or unreadable, or a text is not a string.
        ConfigError: a number of frames that a video model does not take.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    z_text = self.encode_text(texts)
    if not has_prompts(self):
        z_video = self.encode_video(videos, batch_size, frames=frames, on_error=on_error)
        logits = self.logit_scale * (z_video @ z_text.T) + self.logit_bias
        return logits.astype(np.float32)
    check_tower(self.model, "vision", self.name)
    graph, state = self._split
    z_text = _text_features(graph, state, self.tokenizer(texts)) if texts else z_text
    size = _videos_at_once(self, batch_size)
    stream = _read(self, videos, frames, on_error)
    batches = map(self.preprocess.normalize, _pixels(self.preprocess, stream, size))
    encode = functools.partial(_prompted_logits, graph, state, z_text)
    return run_batches(encode, batches, size, len(texts), self._mesh)


@functools.partial(jax.jit, static_argnums=0)
def _text_features(graph: Any, state: Any, tokens: Array) -> Array:
    return nnx.merge(graph, state).text(tokens)  # not of unit norm


@functools.partial(jax.jit, static_argnums=0)
def _prompted_logits(graph: Any, state: Any, texts: Array, videos: Array) -> Array:
    model = nnx.merge(graph, state)
    z, context = model.vision.features(videos)
    z_text = unit_norm(model.vision.prompted(texts, context))
    cosines = jnp.einsum("be,bme->bm", unit_norm(z), z_text)
    return jnp.exp(model.logit_scale[...]) * cosines


def has_prompts(bundle: Any) -> bool:
    """Return True if the text embeddings of a model depend on the video, as X-CLIP's."""
    return isinstance(bundle.config.vision, XCLIPConfig)


def frames_of(bundle: Any, frames: int | None = None) -> int:
    """Return the number of frames that `encode_video` takes of each video.

    Raises:
        ConfigError: none, or a number that a video model does not take.
    """
    fixed = bundle.config.vision.video_frames
    if frames is not None and frames < 1:
        raise ConfigError(f"frames is {frames}: give at least 1")
    if fixed is not None and frames not in (None, fixed):
        raise ConfigError(
            f"frames is {frames}, and {bundle.name} takes videos of {fixed} frames: give {fixed}"
        )
    return frames or fixed or FRAMES


def _frame_means(
    bundle: Any, videos: Iterable[list[Image.Image]], size: int
) -> Float32[np.ndarray, "n d"]:
    """Return the normalized mean of the frames' embeddings of each video."""
    counts: list[int] = []

    def flat() -> Iterator[Image.Image]:
        for video in videos:
            counts.append(len(video))
            yield from video

    z = bundle.encode_image(flat(), size)
    starts = np.cumsum([0, *counts[:-1]])
    z = np.add.reduceat(z, starts) / np.asarray(counts, np.float32)[:, None]
    return z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), np.float32(1e-12))


def _read(
    bundle: Any, videos: Any, frames: int | None, on_error: OnError | None
) -> Iterator[list[Image.Image]]:
    count, stream = frames_of(bundle, frames), one_or_many_videos(videos)
    fixed = bundle.config.vision.video_frames is not None
    return read_videos(bundle.preprocess, stream, count, repeat=fixed, on_error=on_error)


def _videos_at_once(bundle: Any, batch_size: int | None) -> int:
    """Return the batch size of a video model: by default, of as many frames as images."""
    size = batch_size_of(batch_size)
    return size if batch_size is not None else max(1, size // bundle.config.vision.video_frames)


def _pixels(
    preprocess: Preprocess, videos: Iterator[list[Image.Image]], size: int
) -> Iterator[UInt8[np.ndarray, "n f h w 3"]]:
    """Yield batches of `size` videos."""
    for group in iter(lambda: list(itertools.islice(videos, size)), []):
        yield np.stack([[preprocess.pixels(frame) for frame in video] for video in group])
