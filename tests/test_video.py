"""`Bundle.encode_video` of image models: normalized means of the frames' embeddings."""

import numpy as np
import pytest
from PIL import Image
from test_bundle import make

from vlm.cli.images import VIDEO, find_images
from vlm.errors import ConfigError, DataError
from vlm.heads import RetrievalIndex, VideoEncoder

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 11, 20, 24, 3), np.uint8)


def expected(model, frames, count):
    positions = [int(i * len(frames) / count) for i in range(count)]
    z = model.encode_image([frames[i] for i in positions]).astype(np.float64)
    mean = z.mean(axis=0)
    return mean / np.linalg.norm(mean)


def test_a_video_is_the_normalized_mean_of_its_frames():
    model = make()
    z = model.encode_video(list(FRAMES))
    assert z.shape == (3, 24)
    assert z.dtype == np.float32
    np.testing.assert_allclose(z, [expected(model, video, 8) for video in FRAMES], atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-6)
    few = model.encode_video(FRAMES[0], frames=3, batch_size=2)
    np.testing.assert_allclose(few[0], expected(model, FRAMES[0], 3), atol=2e-6)
    short = model.encode_video([FRAMES[0], FRAMES[1, :2]])
    np.testing.assert_allclose(short[1], expected(model, FRAMES[1, :2], 2), atol=2e-6)
    assert model.encode_video([]).shape == (0, 24)


def test_groups_of_videos_do_not_change_the_result(monkeypatch):
    model = make()
    before = model.encode_video(list(FRAMES))
    monkeypatch.setattr("vlm.video._GROUP", 2)
    np.testing.assert_allclose(model.encode_video(list(FRAMES)), before, atol=1e-6)


def test_bad_videos_and_options():
    model, bad = make(), []
    z = model.encode_video([FRAMES[0], [], FRAMES[1]], on_error=lambda i, _: bad.append(i))
    assert (len(z), bad) == (2, [1])
    with pytest.raises(DataError, match="video 1 has no frames"):
        model.encode_video([FRAMES[0], []])
    with pytest.raises(ConfigError, match="frames is 0"):
        model.encode_video(FRAMES[0], frames=0)
    with pytest.raises(ConfigError, match="batch_size 0"):
        model.encode_video(FRAMES[0], batch_size=0)


def test_images_in_place_of_videos_are_an_error(tmp_path):
    """The images are the frames of one video, so there would be fewer embeddings than ids."""
    index = RetrievalIndex(VideoEncoder(make(), frames=2))
    places = [tmp_path / f"{name}.png" for name in "ab"]
    for place in places:
        Image.fromarray(FRAMES[0, 0]).save(place)
    with pytest.raises(DataError, match="1 embeddings of 2 items"):
        index.add(places)
    assert len(index) == 0
    with pytest.raises(DataError, match="is an image file: leave out --video"):
        find_images([str(places[0])], kind=VIDEO)
