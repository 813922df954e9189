"""`decode="reference"` beside Pillow's own `Image.open(file).convert("RGB")`, pixel by pixel."""

import io

import numpy as np
import pytest
from PIL import Image

from vlm.config import PreprocessConfig
from vlm.errors import DataError
from vlm.inputs.batches import pixel_batches
from vlm.inputs.opening import open_image
from vlm.inputs.preprocess import Preprocess

RNG = np.random.default_rng(0)
RGB = Image.fromarray(RNG.integers(0, 256, (40, 24, 3), np.uint8))


def saved(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def turned(tag: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = tag
    return saved(RGB, "JPEG", exif=exif, quality=95)


def transparent(mode: str) -> Image.Image:
    image = RGB.convert(mode)
    image.putalpha(Image.fromarray(RNG.integers(0, 256, (40, 24), np.uint8)))
    return image


PALETTE = RGB.quantize(16)
DEEP = Image.fromarray(RNG.integers(0, 1 << 16, (40, 24), np.uint16))
# Those that the two rules open to different pixels, and those that they open to the same.
DIFFERENT = {
    "EXIF 6": turned(6),
    "EXIF 3": turned(3),
    "RGBA": saved(transparent("RGB"), "PNG"),
    "LA": saved(transparent("L"), "PNG"),
    "WebP with alpha": saved(transparent("RGB"), "WEBP", lossless=True),
    "palette with a transparent colour": saved(PALETTE, "PNG", transparency=3),
    "GIF with a transparent colour": saved(PALETTE, "GIF", transparency=3),
    "16-bit grey": saved(DEEP, "PNG"),
}
SAME = {
    "RGB": saved(RGB, "PNG"),
    "grey": saved(RGB.convert("L"), "JPEG"),
    "two colours": saved(RGB.convert("1"), "PNG"),
    "palette": saved(PALETTE, "PNG"),
    "CMYK": saved(RGB.convert("CMYK"), "JPEG", quality=95),
    "YCbCr TIFF": saved(RGB, "TIFF"),
}


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("name", [*DIFFERENT, *SAME])
def test_the_reference_pixels_are_pillows_own(name, tmp_path):
    data = (DIFFERENT | SAME)[name]
    (tmp_path / "a").write_bytes(data)
    for image in (data, tmp_path / "a", Image.open(io.BytesIO(data))):
        found = open_image(image, decode="reference")
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), pillow(data))
    intended = np.asarray(open_image(data))
    assert (name in SAME) == np.array_equal(intended, pillow(data))


def test_preprocessing_carries_the_rule_to_every_way_in():
    data = list(DIFFERENT.values())
    config = PreprocessConfig(image_size=16, decode="reference")
    preprocess = Preprocess(config)
    expected = [
        np.asarray(Image.fromarray(pillow(d)).resize((16, 16), Image.Resampling.BICUBIC))
        for d in data
    ]
    opened = [Image.open(io.BytesIO(d)) for d in data]
    for images in (data, opened):
        (batch,) = pixel_batches(preprocess, iter(images), len(data))
        np.testing.assert_array_equal(batch, np.stack(expected))
    other = Preprocess(PreprocessConfig(image_size=16))
    assert all(not np.array_equal(other.pixels(d), e) for d, e in zip(data, expected, strict=True))


def test_a_large_turned_photo_is_drafted_as_it_lies():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.new("RGB", (640, 320)), "JPEG", exif=exif)
    asked = []

    def smallest(width: int, height: int) -> tuple[int, int]:
        asked.append((width, height))
        return width // 4, height // 4

    assert open_image(data, smallest=smallest, decode="reference").size == (160, 80)
    assert open_image(data, smallest=smallest).size == (80, 160)
    assert asked == [(640, 320), (320, 640)]


def test_a_damaged_file_is_refused_by_either_rule():
    data = saved(RGB, "PNG")[:-200]
    with pytest.raises(DataError, match="cannot be decoded"):
        open_image(data, decode="reference")
