"""Frames of videos: detect videos, open files with PyAV, sample frames uniformly, read ahead."""

import collections
import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from vlm.errors import ConfigError, DataError, first_line
from vlm.inputs.decoding_limits import too_many_pixels
from vlm.inputs.opening import SUFFIXES, ImageLike, OnError, is_image
from vlm.inputs.preprocess import Preprocess
from vlm.paths import as_path, is_remote, storage_error_reason

# A video: the path of a file, an array (frames, h, w, 3), or its frames as images.
VideoLike = str | os.PathLike | np.ndarray | Sequence[ImageLike]

# File extensions that commands take for videos. An animated GIF is one too.
VIDEO_SUFFIXES = frozenset({
    ".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg",
    ".mpeg", ".flv", ".wmv", ".asf", ".ogv", ".gif",
})  # fmt: skip
# Containers by FFmpeg's names. It would try some hundred more, among them playlists, which name
# other files and web addresses.
_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif"
_THREADS = 2  # files that are decoded at once, each by a few threads of FFmpeg
_FRAME_SUFFIXES = SUFFIXES - VIDEO_SUFFIXES


def sampled(total: int, count: int) -> list[int]:
    """Positions of `count` of `total` frames, at equal distances from the first frame on.

    They are floor(i * total / count), as in transformers' video processors. A video with fewer
    frames repeats some.

    Example:
        >>> from vlm.inputs.videos import sampled
        >>> sampled(20, 8)
        [0, 2, 5, 7, 10, 12, 15, 17]
    """
    return [i * total // count for i in range(count)]


def one_or_many_videos(videos: Any) -> Iterator[Any]:
    """Iterate over `videos`, which may also be a single video.

    A list whose first item is an image (a PIL image, an array (h, w, 3) or the path of an image
    file) is one video; any other is several.

    Raises:
        DataError: neither a video nor a collection of them.
    """
    if isinstance(videos, str | os.PathLike):
        return iter([videos])
    if shape := getattr(videos, "shape", ()):
        if len(shape) == 4:
            return iter([videos])
        if len(shape) != 5:
            raise DataError(
                f"videos is an array of shape {tuple(shape)}: give (frames, h, w, 3) for one "
                "video, or (n, frames, h, w, 3) for several"
            )
    elif not isinstance(videos, Iterable) or isinstance(videos, bytes) or hasattr(videos, "read"):
        raise DataError(_not_a_video("videos", videos))
    stream = iter(videos)
    first = list(itertools.islice(stream, 1))
    if first and _is_frame(first[0]):
        return iter([[*first, *stream]])
    return itertools.chain(first, stream)


def read_videos(
    preprocess: Preprocess,
    videos: Iterator[Any],
    count: int,
    *,
    repeat: bool,
    on_error: OnError | None = None,
) -> Iterator[list[Image.Image]]:
    """Yield `count` uniformly sampled frames of each video, in mode RGB; the next is read ahead.

    With `repeat`, a video with fewer frames repeats some; else it has fewer. Unreadable videos are
    passed to `on_error` and skipped. Without `on_error` they raise a DataError.
    """
    pool = ThreadPoolExecutor(_THREADS, "vlm-video")
    window: collections.deque[tuple[int, Future]] = collections.deque()
    numbered = enumerate(videos)

    def submit(more: int) -> None:
        for number, video in itertools.islice(numbered, more):
            name = f"video {number}"
            if isinstance(video, str | os.PathLike):
                frames = pool.submit(_frames_of_file, preprocess, video, count, repeat)
            else:  # now, because a caller may refill its buffer
                frames = _done(lambda v=video, n=name: _frames(preprocess, v, n, count, repeat))
            window.append((number, frames))

    try:
        submit(_THREADS)
        while window:
            number, frames = window.popleft()
            try:
                found = frames.result()
            except DataError as error:
                if on_error is None:
                    raise
                on_error(number, error)
                submit(1)
                continue
            submit(1)
            yield found
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _done(read: Callable[[], list[Image.Image]]) -> Future:
    frames: Future = Future()
    try:
        frames.set_result(read())
    except DataError as error:  # raised in order, like those of the threads
        frames.set_exception(error)
    return frames


def _frames(
    preprocess: Preprocess, video: Any, name: str, count: int, repeat: bool
) -> list[Image.Image]:
    """Sample the frames of a video that is an array or a collection of images."""
    shape = getattr(video, "shape", ())
    if shape and len(shape) != 4:
        raise DataError(f"{name} is an array of shape {tuple(shape)}: give (frames, h, w, 3)")
    if not shape and (not isinstance(video, Iterable) or isinstance(video, bytes | Image.Image)):
        raise DataError(_not_a_video(name, video))
    frames: Any = video if shape else list(video)
    if not len(frames):
        raise DataError(f"{name} has no frames: remove it")
    opened = {}
    for i in _positions(len(frames), count, repeat):
        if i not in opened:
            frame, where = frames[i], f"frame {i} of {name}"
            if not _is_frame(frame):
                raise DataError(_not_a_frame(where, frame))
            image = preprocess.open(frame, where)
            opened[i] = image if isinstance(frame, str | os.PathLike | bytes) else image.copy()
    return [opened[i] for i in _positions(len(frames), count, repeat)]


def _positions(total: int, count: int, repeat: bool) -> list[int]:
    return sampled(total, count if repeat else min(total, count))


def _frames_of_file(
    preprocess: Preprocess, path: epath.PathLike, count: int, repeat: bool
) -> list[Image.Image]:
    """Decode a file and sample its frames.

    All frames are decoded, and only the sampled ones converted. The number of frames in the header
    may be absent or wrong; then the file is decoded a second time.
    """
    name = os.fspath(path)
    if os.path.splitext(name)[1].lower() in _FRAME_SUFFIXES:
        raise DataError(f"{name} is an image file: use encode_image, or give a list of frames")
    total = _with_video(path, lambda container, stream: stream.frames or _packets(container))
    wanted, found, decoded = [0], {}, -1
    for _ in range(2):
        if decoded != total:
            total = total if decoded < 0 else decoded
            wanted = _positions(max(total, 1), count, repeat)
            found, decoded = _with_video(
                path, lambda _, stream, wanted=wanted: _decode(stream, wanted, preprocess, name)
            )
    if not found:
        raise DataError(f"{name} has no frames that can be decoded: replace or remove it")
    return [found[i] for i in wanted if i in found]


def _packets(container: Any) -> int:
    return sum(packet.size > 0 for packet in container.demux(video=0))


def _decode(
    stream: Any, wanted: Sequence[int], preprocess: Preprocess, name: str
) -> tuple[dict[int, Image.Image], int]:
    """Return the wanted frames by their number, and the number of all frames."""
    kept, found, decoded = set(wanted), {}, 0
    stream.thread_type = "AUTO"
    upright = preprocess.config.decode != "reference"
    for packet in stream.container.demux(stream):
        if packet.is_corrupt:  # FFmpeg's threads would leave it out
            raise DataError(f"{name} is truncated or damaged: replace or remove it")
        for frame in packet.decode():
            if decoded in kept:
                if frame.width * frame.height > preprocess.max_pixels:
                    size = f"frames of {frame.width:,} x {frame.height:,}"
                    raise too_many_pixels(name, size, preprocess.max_pixels)
                image = Image.fromarray(frame.to_ndarray(format="rgb24"))
                turn = frame.rotation if upright else 0
                found[decoded] = image.rotate(turn, expand=True) if turn else image
            decoded += 1
    return found, decoded


def _with_video(path: epath.PathLike, use: Callable[[Any, Any], Any]) -> Any:
    """Open a file, and return `use(container, stream)`.

    Raises:
        DataError: the file is missing, damaged, or no video.
    """
    name, av = os.fspath(path), _pyav(path)
    try:
        where = as_path(path)
        if where.is_dir():
            raise DataError(f"{name} is a folder, not a video: give the files inside it")
        if not where.exists():
            raise DataError(f"there is no video {name}: check the path")
        with contextlib.ExitStack() as stack:
            # FFmpeg takes a name such as "12:30.mp4" for an address, unless it is absolute.
            remote = is_remote(path)
            file = stack.enter_context(where.open("rb")) if remote else os.path.abspath(where)
            container = av.open(file, options={"format_whitelist": _CONTAINERS})
            stack.enter_context(container)
            if not container.streams.video:
                raise DataError(f"{name} has no video, only sound or text: remove it")
            return use(container, container.streams.video[0])
    except ConfigError as error:
        raise DataError(str(error)) from None
    except av.error.FFmpegError as error:
        raise DataError(
            f"{name} is not a video that FFmpeg reads, or a damaged one "
            f"({first_line(error)[:200]}): replace or remove it"
        ) from error
    except OSError as error:
        raise DataError(f"{name} cannot be read ({storage_error_reason(error)})") from error


def _pyav(path: epath.PathLike) -> Any:
    try:
        import av
    except ImportError:
        raise DataError(
            f"{os.fspath(path)} is a video file, which needs PyAV: run pip install "
            '"vlm-jax[video]", or give the frames as images'
        ) from None
    return av


def _is_frame(item: Any) -> bool:
    if isinstance(item, str | os.PathLike):
        return os.path.splitext(os.fspath(item))[1].lower() in _FRAME_SUFFIXES
    return is_image(item)


def _not_a_video(name: str, item: Any) -> str:
    return (
        f"{name} is a {type(item).__name__}: give the path of a video file, a uint8 array "
        "(frames, h, w, 3) or a list of frames"
    )


def _not_a_frame(name: str, item: Any) -> str:
    given = repr(item) if isinstance(item, str | os.PathLike) else f"a {type(item).__name__}"
    return f"{name} is {given}: give an image, or video files in a list without images"
