"""Streams of images whose objects are shared, reused or bad."""

import io

import numpy as np
import pytest
from PIL import Image, ImageSequence

from vlm.config import PreprocessConfig
from vlm.errors import DataError
from vlm.inputs.batches import pixel_batches
from vlm.inputs.preprocess import Preprocess

PREPROCESS = Preprocess(PreprocessConfig(image_size=16))


def pixels(images, size=4, on_error=None):
    batches = list(pixel_batches(PREPROCESS, iter(images), size, on_error))
    assert all(len(batch) == size for batch in batches[:-1])
    return np.concatenate(batches)


def noise(count, side=200):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_the_same_image_many_times(form):
    file = io.BytesIO()
    Image.fromarray(noise(1, 600)[0]).save(file, form)
    expected = PREPROCESS.pixels(file.getvalue())
    for _ in range(5):
        image = Image.open(io.BytesIO(file.getvalue()))
        for row in pixels([image] * 16):
            np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_frames_of_one_file(form):
    frames = [Image.fromarray(frame) for frame in noise(12, 96)]
    file = io.BytesIO()
    frames[0].save(file, form, save_all=True, append_images=frames[1:])
    expected = [
        PREPROCESS.pixels(frame.copy())
        for frame in ImageSequence.Iterator(Image.open(io.BytesIO(file.getvalue())))
    ]
    assert len(expected) == 12
    got = pixels(ImageSequence.Iterator(Image.open(io.BytesIO(file.getvalue()))))
    np.testing.assert_array_equal(got, expected)


def test_a_canvas_and_a_buffer_that_are_used_again():
    frames = noise(24)
    expected = [PREPROCESS.pixels(frame) for frame in frames]

    def drawn():
        canvas = Image.new("RGB", (200, 200))
        for frame in frames:
            canvas.paste(Image.fromarray(frame))
            yield canvas

    def filled():
        buffer = np.empty_like(frames[0])
        for frame in frames:
            buffer[:] = frame
            yield buffer

    np.testing.assert_array_equal(pixels(drawn()), expected)
    np.testing.assert_array_equal(pixels(filled()), expected)


@pytest.mark.untyped
def test_bad_images_are_told_in_order_and_left_out(tmp_path):
    good = noise(7)
    half = io.BytesIO()
    Image.fromarray(good[0]).save(half, "PNG")
    half = Image.open(io.BytesIO(half.getvalue()[:5000]))  # decoded by the caller's thread
    images = [b"", *good[:3], half, tmp_path / "gone.png", *good[3:], 5]
    errors = []
    got = pixels(images, on_error=lambda at, error: errors.append((at, str(error))))
    np.testing.assert_array_equal(got, [PREPROCESS.pixels(image) for image in good])
    assert [at for at, _ in errors] == [0, 4, 5, 10]
    assert [text.split(" ")[:2] for _, text in errors[:2]] == [["image", "0"], ["image", "4"]]
    with pytest.raises(DataError, match="image 0 is empty"):
        pixels(images)
    with pytest.raises(DataError, match="image 3 cannot be decoded"):
        pixels(images[1:])
    assert list(pixel_batches(PREPROCESS, iter([b"", b""]), 4, lambda *error: None)) == []
