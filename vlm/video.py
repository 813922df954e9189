"""`Bundle.encode_video`: one embedding for each video.

An image model averages the embeddings of uniformly sampled frames, and normalizes the mean again:
CLIP4Clip's parameter-free similarity (Luo et al., 2021, arXiv:2104.08860). Perception Encoder's
`encode_video` is the same mean, up to its length. A video model has a tower that takes all frames.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from vlm.errors import ConfigError
from vlm.inputs.batches import batch_size_of
from vlm.inputs.opening import OnError
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.videos import VideoLike, one_or_many_videos, read_videos
from vlm.weights.instantiate import check_tower

FRAMES = 8  # of a video, for image models: Perception Encoder's (arXiv:2504.13181)
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
    fixed = self.config.vision.video_frames
    count = frames_of(self, frames)
    stream = read_videos(
        self.preprocess,
        one_or_many_videos(videos),
        count,
        repeat=fixed is not None,
        on_error=on_error,
    )
    size = batch_size_of(batch_size)
    if fixed is None:
        parts = [np.zeros((0, self.embed_dim), np.float32)]
        for first in stream:
            group = itertools.chain([first], itertools.islice(stream, _GROUP - 1))
            parts.append(_frame_means(self, group, size))
        return np.concatenate(parts)
    size = size if batch_size is not None else max(1, size // fixed)
    groups = iter(lambda: list(itertools.islice(stream, size)), [])
    batches = (np.stack([_pixels(self.preprocess, video) for video in group]) for group in groups)
    return self._run(self._image_program, batches, size)


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
            f"frames is {frames}, and {bundle.name} takes videos of {fixed} frames: leave it out"
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


def _pixels(preprocess: Preprocess, frames: Sequence[Image.Image]) -> UInt8[np.ndarray, "f h w 3"]:
    return np.stack([preprocess.pixels(frame) for frame in frames])
