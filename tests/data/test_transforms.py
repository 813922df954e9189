import colorsys
import dataclasses
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from vlm.config import AugmentConfig, DataConfig, PreprocessConfig
from vlm.data.randomness import uniforms
from vlm.data.transform_example import NUMBERS, ExampleTransform
from vlm.data.transforms import DRAWS, Augment, color_map, crop_box
from vlm.errors import ConfigError
from vlm.inputs.preprocess import Preprocess

UNIT = st.floats(0, 1, exclude_max=True)
NOISE = Image.fromarray(np.random.default_rng(0).integers(60, 190, (40, 40, 3), np.uint8))


def augmented(image, config, u=None, size=40, **changes):
    augment = Augment(config, Preprocess(PreprocessConfig(image_size=size, **changes)))
    return augment(image, np.full(DRAWS, 0.5) if u is None else u)


@pytest.mark.parametrize(
    "inputs",
    [
        {"kernel": "bilinear", "backend": "tensor"},
        {"kernel": "bilinear", "backend": "tensorflow", "antialias": False},
        {"resize": "crop"},
        {"resize": "pad"},
    ],
    ids=["siglip", "big_vision", "clip", "pad"],
)
def test_without_a_crop_training_resizes_as_evaluation_does(inputs):
    """A centre crop of the same aspect would keep two thirds of an image of 640 x 427."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (43, 64, 3), np.uint8))
    got = augmented(image, AugmentConfig(crop=None), size=16, **inputs)
    expected = Preprocess(PreprocessConfig(image_size=16, **inputs)).pixels(image)
    np.testing.assert_array_equal(got, expected)
    mirrored = augmented(
        image, AugmentConfig(crop=None, flip=True), np.zeros(DRAWS), size=16, **inputs
    )
    np.testing.assert_array_equal(mirrored, expected[:, ::-1])


@given(
    st.integers(1, 500),
    st.integers(1, 500),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    st.lists(UNIT, min_size=22, max_size=22),
)
@settings(max_examples=150, deadline=None)
def test_crops_lie_inside_with_area_and_aspect_in_range(width, height, crop, u):
    config = AugmentConfig(crop=tuple(crop))
    left, top, right, bottom = crop_box(width, height, config, u)
    slack = 1e-6 * max(width, height)
    assert -slack <= left < right <= width + slack
    assert -slack <= top < bottom <= height + slack
    aspect = (right - left) / (bottom - top)
    assert 3 / 4 - 1e-6 <= aspect <= 4 / 3 + 1e-6
    area = (right - left) * (bottom - top) / (width * height)
    # When no crop fits, it is the largest box of an allowed aspect, in the centre.
    centred = abs(left - (width - right)) < slack and abs(top - (height - bottom)) < slack
    largest = right - left > width - slack or bottom - top > height - slack
    assert crop[0] - 1e-6 <= area <= crop[1] + 1e-6 or (centred and largest)


def test_crops_cover_the_image_and_use_the_whole_range_of_areas():
    rng = np.random.default_rng(0)
    boxes = np.array(
        [
            crop_box(100, 100, AugmentConfig(crop=(0.25, 0.9)), rng.random(22).tolist())
            for _ in range(2000)
        ]
    )
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 1e4
    assert areas.min() < 0.27
    assert areas.max() > 0.87
    assert boxes[:, 0].min() < 1
    assert boxes[:, 2].max() > 99


def test_without_changes_it_is_the_models_own_preprocessing():
    config = AugmentConfig(crop=(1.0, 1.0), aspect=(1.0, 1.0))
    expected = Preprocess(PreprocessConfig(image_size=16)).pixels(NOISE)
    np.testing.assert_array_equal(augmented(NOISE, config, size=16), expected)


def test_flip_happens_half_the_time():
    config = AugmentConfig(crop=(1.0, 1.0), aspect=(1.0, 1.0), flip=True)
    u = np.full(DRAWS, 0.5)
    u[22] = 0.6
    np.testing.assert_array_equal(augmented(NOISE, config, u), np.asarray(NOISE))
    u[22] = 0.4
    np.testing.assert_array_equal(augmented(NOISE, config, u), np.asarray(NOISE)[:, ::-1])


@pytest.mark.parametrize(
    ("place", "enhancer"),
    [(0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)],
)
@pytest.mark.parametrize("draw", [0.0, 0.3, 0.9])
def test_brightness_contrast_and_saturation_are_pillows(place, enhancer, draw):
    config = AugmentConfig(crop=(1.0, 1.0), aspect=(1.0, 1.0), jitter=0.3)
    u = np.full(DRAWS, 0.5)
    u[23 + place] = draw
    expected = np.asarray(enhancer(NOISE).enhance(1 + 0.3 * (2 * draw - 1)))
    got = augmented(NOISE, config, u)
    np.testing.assert_allclose(got.astype(int), expected.astype(int), atol=2)


def test_neutral_draws_change_no_colour():
    config = AugmentConfig(crop=(1.0, 1.0), aspect=(1.0, 1.0), jitter=0.8, hue=0.5)
    np.testing.assert_array_equal(augmented(NOISE, config), np.asarray(NOISE))


def test_values_beyond_the_range_are_clipped_not_wrapped():
    image = Image.fromarray(np.array([[[250, 250, 250], [0, 0, 0]]], np.uint8).repeat(2, 0))
    config = AugmentConfig(crop=(1.0, 1.0), aspect=(0.1, 10.0), jitter=1.0)
    u = np.full(DRAWS, 0.5)
    u[1:22:2] = 0.5
    u[23:25] = 0.99
    out = augmented(image, config, u, size=2, kernel="nearest")
    assert set(out.ravel().tolist()) <= {0, 255}


def test_hue_turns_colours_and_keeps_luma():
    matrix, offset = color_map(
        AugmentConfig(hue=0.5), [0.5, 0.5, 0.5, 0.75], np.zeros(3, np.float32)
    )
    red = np.array([0.5, 0.3, 0.3])
    turned = matrix @ red + offset
    luma = np.array([0.299, 0.587, 0.114])
    assert luma @ turned == pytest.approx(luma @ red, abs=1e-4)
    before, after = colorsys.rgb_to_hsv(*red)[0], colorsys.rgb_to_hsv(*turned)[0]
    assert min(abs(after - before), 1 - abs(after - before)) == pytest.approx(0.25, abs=0.08)
    grey = np.array([0.4, 0.4, 0.4])
    np.testing.assert_allclose(matrix @ grey + offset, grey, atol=1e-3)


@pytest.mark.untyped
def test_impossible_settings_are_named():
    for changes in (
        {"crop": (0.0, 1.0)},
        {"crop": (0.9, 0.5)},
        {"crop": (0.5, 1.5)},
        {"aspect": (2.0, 1.0)},
        {"jitter": 1.5},
        {"hue": 0.6},
    ):
        with pytest.raises(ConfigError, match=f"AugmentConfig.{next(iter(changes))}"):
            AugmentConfig(**changes)


def photo(width: int, height: int, orientation: int = 1) -> bytes:
    """A JPEG of smooth colours with some detail, as a camera makes it."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 37 + k) + np.cos(y / 53 - k) + 0.2 * np.sin(x * y / 9000) for k in range(3)]
    pixels = np.clip(127 + 50 * np.stack(waves, -1), 0, 255).astype(np.uint8)
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(out, "JPEG", quality=92, exif=exif)
    return out.getvalue()


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize(
    ("width", "height", "fraction"),
    [(120, 90, 1), (280, 210, 2), (641, 433, 4), (1603, 1201, 8), (1600, 1200, 8)],
)
def test_a_fraction_of_a_jpeg_gives_the_same_crop(width, height, fraction, orientation):
    config = AugmentConfig(crop=(0.6, 0.9), flip=True, jitter=0.2)
    transform = ExampleTransform(
        [DataConfig(augment=config)], Preprocess(PreprocessConfig(image_size=64))
    )
    whole = dataclasses.replace(config, draft=False)
    slow = ExampleTransform(
        [DataConfig(augment=whole)], Preprocess(PreprocessConfig(image_size=64))
    )
    data = photo(width, height, orientation)
    decoded = []

    def smallest(w, h):
        decoded.append((w, h))
        return transform._augment.smallest(w, h, draws[:-1])

    for draws in uniforms(0, np.arange(5), NUMBERS):
        outs = np.empty((2, 64, 64, 3), np.uint8)
        example = {"image": data, "caption": "x"}
        assert transform(example, draws, outs, 0, "") == slow(example, draws, outs, 1, "") == "x"
        a, b = outs
        error = np.abs(a.astype(int) - b)
        assert error.mean() < 0.7
        assert error.max() < 30
        image = transform._preprocess.open(data, "", smallest)
        upright = (height, width) if orientation == 6 else (width, height)
        assert not decoded or decoded[-1] == upright
        turned = orientation != 1 and (width % 8 or height % 8)  # then it is decoded whole
        assert round(upright[0] / image.width) == (1 if turned else fraction)


def test_other_formats_and_the_models_own_resize_are_decoded_whole():
    out = io.BytesIO()
    Image.open(io.BytesIO(photo(640, 480))).save(out, "PNG")
    whole = Preprocess(PreprocessConfig(image_size=8))
    assert whole.open(out.getvalue(), "", lambda w, h: (1, 1)).size == (640, 480)
    none = Augment(AugmentConfig(crop=None), whole)
    assert none.smallest(640, 480, np.zeros(NUMBERS - 1)) == (640, 480)
