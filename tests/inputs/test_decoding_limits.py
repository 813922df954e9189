"""Files that are small and expensive to decode are refused by their headers."""

import io
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
from image_bombs import png, saved, scan_bomb, tiff_of_one_tile
from PIL import Image

from vlm.config import PreprocessConfig
from vlm.errors import DataError
from vlm.inputs import opening
from vlm.inputs.batches import pixel_batches
from vlm.inputs.decoding_limits import MAX_SCANS, check_decoding, count_scans
from vlm.inputs.opening import open_image
from vlm.inputs.preprocess import Preprocess

SCRIPT = pathlib.Path(__file__).parent / "decoding_memory.py"


@pytest.fixture(scope="module")
def photo():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    return Image.fromarray(pixels)


def with_segment(data: bytes, content: bytes) -> bytes:
    """Insert a comment at the start of a JPEG file."""
    length = (len(content) + 2).to_bytes(2, "big")
    return data[:2] + b"\xff\xfe" + length + content + data[2:]


def test_scans_are_counted_as_a_decoder_meets_them(photo):
    one, ten = saved(photo, "JPEG"), saved(photo, "JPEG", progressive=True)
    assert (count_scans(one, 99), count_scans(ten, 99), count_scans(ten, 4)) == (1, 10, 4)
    with_restarts = saved(photo, "JPEG", restart_marker_blocks=1, progressive=True)
    assert count_scans(with_restarts, 99) == 10
    preview = with_segment(one, 50 * saved(photo.resize((8, 8)), "JPEG", progressive=True)[:600])
    assert count_scans(preview, 99) == 1  # a preview inside of a segment is not decoded
    assert count_scans(one + 20 * ten, 99) == 1  # nor are images behind the first
    assert count_scans(scan_bomb(31, 64, 64), 99) == 41
    assert count_scans(b"\xff\xd8" + b"\xff" * 1000, 99) == count_scans(b"", 99) == 1


def test_a_file_of_empty_segments_is_counted_quickly():
    start = time.process_time()
    count_scans(b"\xff\xd8" + 200_000 * b"\xff\xfe\x00\x02" + b"\xff\xda\x00\x02", 99)
    assert time.process_time() - start < 5


def test_a_bomb_of_scans_is_refused_before_it_is_decoded():
    bomb = scan_bomb(80)
    start = time.process_time()
    with pytest.raises(DataError, match=r"it is a JPEG of 32,000,000 pixels with more than 67 sc"):
        open_image(bomb, name="it")
    assert time.process_time() - start < 1  # decoding takes longer
    with pytest.raises(DataError, match=f"more than {MAX_SCANS} scans"):
        open_image(scan_bomb(100, 64, 64))
    assert open_image(scan_bomb(80, 64, 64)).size == (64, 64)


def test_a_bomb_among_images_is_a_bad_one(photo, tmp_path):
    (tmp_path / "bomb.jpg").write_bytes(scan_bomb(100, 64, 64))
    images = [saved(photo, "JPEG"), tmp_path / "bomb.jpg", tiff_of_one_tile(6_000)]
    told = []
    preprocess = Preprocess(PreprocessConfig(image_size=8))
    batches = list(pixel_batches(preprocess, iter(images), 4, lambda *bad: told.append(bad)))
    assert [len(batch) for batch in batches] == [1]
    assert [number for number, _ in told] == [1, 2]
    assert "bomb.jpg is a JPEG" in str(told[0][1])
    assert "image 2 is a TIFF of 10,000 pixels with tiles of 36,000,000 bytes" in str(told[1][1])


@pytest.mark.parametrize(
    ("data", "per_pixel"),
    [
        (lambda image: saved(image, "JPEG"), 8),
        (lambda image: saved(image, "JPEG", progressive=True), 8),
        (lambda image: saved(image, "JPEG", progressive=True, subsampling=0), 10),
        (lambda image: saved(image.convert("CMYK"), "JPEG", progressive=True), 12),
        (lambda image: saved(image.convert("L"), "JPEG", progressive=True), 8),
        (lambda image: saved(image, "PNG"), 8),
        (lambda image: png(60, 40, 16, 6), 8),
        (lambda image: saved(image, "WEBP"), 18),
    ],
)
def test_the_memory_is_bounded_by_format_and_mode(photo, data, per_pixel):

    data, pixels = data(photo), 60 * 40
    assert check_decoding(Image.open(io.BytesIO(data)), data, "it", pixels) == per_pixel * pixels
    assert open_image(data, max_bytes=per_pixel * pixels).size == (60, 40)
    with pytest.raises(DataError, match="bytes of memory while it is decoded from"):
        open_image(data, max_bytes=per_pixel * pixels - 1)
    preprocess = Preprocess(PreprocessConfig(image_size=8), max_bytes=per_pixel * pixels - 1)
    with pytest.raises(DataError, match="raise max_pixels if you trust it"):
        preprocess.pixels(data)


def test_strips_are_converted_as_the_whole_image(photo, monkeypatch):
    rng = np.random.default_rng(1)
    deep = Image.fromarray(rng.integers(0, 1 << 16, (40, 60), np.uint16))
    signed = Image.fromarray(rng.integers(-900, 70_000, (40, 60), np.int32))
    real = Image.fromarray(rng.normal(0, 3, (40, 60)).astype(np.float32))
    alpha = photo.copy()
    alpha.putalpha(Image.fromarray(rng.integers(0, 256, (40, 60), np.uint8)))
    palette = photo.quantize(16)
    palette.info["transparency"] = 3
    turned = Image.Exif()
    turned[0x0112] = 7
    images = [
        deep,
        signed,
        real,
        alpha,
        alpha.convert("LA"),
        palette,
        saved(alpha, "TIFF", exif=turned),
        saved(palette, "PNG", transparency=3, exif=turned),
    ]
    whole = [np.asarray(open_image(image)) for image in images]
    monkeypatch.setattr(opening, "_STRIP_PIXELS", 61)
    for image, expected in zip(images, whole, strict=True):
        np.testing.assert_array_equal(np.asarray(open_image(image)), expected)
    assert whole[-1].shape == (60, 40, 3)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_the_memory_of_every_format_is_within_its_estimate():
    line = [sys.executable, str(SCRIPT), "--width", "4000", "--height", "3000"]
    done = subprocess.run(line, check=False, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout


def test_a_sequential_file_has_one_scan_if_the_first_has_all_components(photo):
    one = saved(photo, "JPEG")
    scan = one[one.rindex(b"\xff\xda") :]
    longer = one[:-2] + 50 * scan  # libjpeg refuses a second scan, or never reads it
    assert count_scans(longer, 99) == 1
    start = time.process_time()
    try:
        opened = open_image(longer)
        assert (np.asarray(opened) == np.asarray(open_image(one))).all()
    except DataError:
        pass
    assert time.process_time() - start < 1
    # A scan of one of three components promises more of them.
    header = one.rindex(b"\xff\xda")
    split = one[: header + 4] + b"\x01" + one[header + 5 : -2] + 5 * scan
    assert count_scans(split, 99) > 1
