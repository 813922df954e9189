"""Videos: what counts as one or several, sampled frames, files of any container, and bad files."""

import numpy as np
import pytest
from PIL import Image

from vlm.config import PreprocessConfig
from vlm.errors import DataError
from vlm.inputs import videos
from vlm.inputs.preprocess import Preprocess

PREPARE = Preprocess(PreprocessConfig(image_size=16))
GREY = [np.full((6, 8, 3), 10 * i, np.uint8) for i in range(12)]


def read(given, count=4, repeat=False, **options):
    stream = videos.one_or_many_videos(given)
    return list(videos.read_videos(PREPARE, stream, count, repeat=repeat, **options))


def values(frames):
    return [int(np.asarray(frame)[0, 0, 0]) for frame in frames]


def write_video(path, frames, codec="mpeg4", rotation=0):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in [*frames, None]:
            if frame is not None:
                frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(frame))
    return path


def test_frames_are_sampled_at_equal_distances():
    assert videos.sampled(12, 4) == [0, 3, 6, 9]
    assert videos.sampled(3, 8) == [0, 0, 0, 1, 1, 1, 2, 2]
    for total in (5, 17, 300):
        assert videos.sampled(total, 5) == [int(i * (total / 5)) for i in range(5)]


def test_one_video_and_several():
    one, array = [0, 30, 60, 90], np.stack(GREY)
    pictures = [Image.fromarray(frame) for frame in GREY]
    for given in (GREY, tuple(GREY), iter(GREY), array, pictures, [GREY], [array]):
        assert [values(video) for video in read(given)] == [one]
    for given in (np.stack([array] * 2), [GREY, array], (x for x in [GREY, pictures])):
        assert [values(video) for video in read(given)] == [one, one]
    assert read([]) == []


def test_a_short_video_has_fewer_frames_or_repeats_some():
    assert [values(v) for v in read(GREY[:2])] == [[0, 10]]
    assert [values(v) for v in read(GREY[:2], repeat=True)] == [[0, 0, 10, 10]]


def test_a_buffer_may_be_refilled():
    buffer = np.zeros((1, 6, 8, 3), np.uint8)

    def refilled():
        for value in (10, 20, 30):
            buffer[:] = value
            yield buffer

    assert [values(video) for video in read(refilled())] == [[10], [20], [30]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "videos is a int: give the path of a video file"),
        (b"data", "videos is a bytes"),
        (np.zeros((6, 8, 3), np.uint8), r"array of shape \(6, 8, 3\): give \(frames, h, w, 3\)"),
        ([[]], "video 0 has no frames"),
        ([GREY, None], "video 1 is a NoneType"),
        ([[GREY[0], "a.mp4"]], "frame 1 of video 0 is 'a.mp4': give an image"),
        ([np.zeros((1, 6, 8, 3))], "frame 0 of video 0 is an array of float64"),
        ("photo.jpg", "photo.jpg is an image file: use encode_image"),
    ],
)
@pytest.mark.untyped
def test_other_input_is_an_error(given, message):
    with pytest.raises(DataError, match=message):
        read(given)


def test_unreadable_videos_are_reported_in_order():
    found = []
    kept = read([[], GREY, [None], GREY], on_error=lambda i, error: found.append((i, str(error))))
    assert [i for i, _ in found] == [0, 2]
    assert [values(video) for video in kept] == [[0, 30, 60, 90]] * 2


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.mov", "a.gif"])
def test_video_files(tmp_path, name):
    codec = "gif" if name.endswith("gif") else "mpeg4"
    big = [np.full((48, 64, 3), 20 * i, np.uint8) for i in range(12)]
    path = write_video(tmp_path / name, big, codec)
    for given in (path, str(path), [path]):
        (frames,) = read(given)
        assert np.abs(np.subtract(values(frames), [0, 60, 120, 180])).max() < 20
    assert len(read([path, str(path)])) == 2


def test_rotated_files_are_upright(tmp_path):
    upright = np.zeros((48, 64, 3), np.uint8)
    upright[:, :32] = 255  # the left half
    path = write_video(tmp_path / "turned.mp4", [upright] * 3, rotation=90)
    (frames,) = read(path)
    assert frames[0].size == (48, 64)
    assert np.asarray(frames[0])[:24].mean() < 20  # counterclockwise: the left half is below
    reference = Preprocess(PreprocessConfig(image_size=16, decode="reference"))
    (frames,) = videos.read_videos(reference, iter([path]), 1, repeat=False)
    assert frames[0].size == (64, 48)


def test_bad_files(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3), np.uint8)
    data = write_video(tmp_path / "whole.avi", list(noise)).read_bytes()
    (tmp_path / "cut.avi").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.mp4").write_text("words " * 100)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:10,\n{tmp_path / 'whole.avi'}\n")
    for name in ("text.mp4", "empty.mp4", "list.mp4", "none.mp4"):
        with pytest.raises(DataError, match=name):
            read(tmp_path / name)
    with pytest.raises(DataError, match=r"cut\.avi is truncated or damaged"):
        read(tmp_path / "cut.avi")
    with pytest.raises(DataError, match="is a folder, not a video"):
        read(tmp_path)
    small = Preprocess(PREPARE.config, max_pixels=1000)
    with pytest.raises(DataError, match="64 x 48"):
        list(videos.read_videos(small, iter([tmp_path / "whole.avi"]), 1, repeat=False))


def test_files_need_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(
        DataError, match=r'a.mp4 is a video file, .* pip install "vlm-jax\[video\]"'
    ):
        read(tmp_path / "a.mp4")
    assert len(read(GREY)) == 1
