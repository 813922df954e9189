import io
import pathlib
import struct
import zlib

import jax
import numpy as np
import pytest
from PIL import Image, ImageCms

from vlm.config import PreprocessConfig
from vlm.errors import ConfigError, DataError
from vlm.inputs.opening import open_image
from vlm.inputs.preprocess import Preprocess, with_options
from vlm.weights.processors import huggingface_preprocess

GOLDEN = np.load(pathlib.Path(__file__).with_name("preprocess_golden.npz"))
CASES = sorted({name.rpartition("/")[0] for name in GOLDEN.files} - {"input"})
COUNT = sum(name.startswith("input/") for name in GOLDEN.files)


def config_of(case: str) -> PreprocessConfig:
    match case.split("/"):
        case ["pillow", resize, kernel, size]:
            return PreprocessConfig(
                image_size=int(size), resize=resize, kernel=kernel, pad_value=(77, 77, 77)
            )
        case ["tensor", antialias, kernel, size]:
            return PreprocessConfig(
                image_size=int(size),
                kernel=kernel,
                backend="tensor",
                antialias=antialias == "True",
            )
        case ["clip", backend]:
            return PreprocessConfig(
                image_size=16, resize="crop", backend=backend, crop_rounding="floor"
            )
        case ["siglip", backend]:
            return PreprocessConfig(image_size=16, backend=backend)
    raise AssertionError(case)


@pytest.mark.parametrize("case", CASES)
def test_pixels_equal_the_reference_bit_for_bit(case):
    preprocess = Preprocess(config_of(case))
    for i in range(COUNT):
        pixels = preprocess.pixels(GOLDEN[f"input/{i}"])
        np.testing.assert_array_equal(pixels, GOLDEN[f"{case}/{i}"], err_msg=f"image {i}")


def test_normalize_is_the_formula_in_numpy_and_under_jit():
    preprocess = Preprocess(
        PreprocessConfig(image_size=4, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    )
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    expected = (pixels / 255 - np.array([0.48, 0.46, 0.41])) / np.array([0.27, 0.26, 0.28])
    for out in (preprocess.normalize(pixels), jax.jit(preprocess.normalize)(pixels)):
        assert out.dtype == np.float32
        np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_array_equal(preprocess(pixels), preprocess.normalize(pixels))


def test_a_mix_of_kinds_gives_the_same_pixels(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    image = Image.fromarray(array)
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    preprocess = Preprocess(PreprocessConfig(image_size=8))
    out = preprocess([array, image, tmp_path / "a.png", str(tmp_path / "a.png"), data])
    assert out.shape == (5, 8, 8, 3)
    for row in out:
        np.testing.assert_array_equal(row, out[0])
    np.testing.assert_array_equal(preprocess(image), out[:1])
    np.testing.assert_array_equal(preprocess(array), out[:1])
    np.testing.assert_array_equal(preprocess(x for x in [array, image]), out[:2])


def test_zero_images():
    assert Preprocess(PreprocessConfig(image_size=8))([]).shape == (0, 8, 8, 3)


def test_pixels_are_the_callers_to_change():
    image = Image.new("RGB", (8, 8))
    pixels = Preprocess(PreprocessConfig(image_size=8)).pixels(image)
    pixels[:] = 9
    assert image.getpixel((0, 0)) == (0, 0, 0)


def test_short_side_then_crop():
    config = PreprocessConfig(image_size=4, resize="crop", short_side=8, kernel="nearest")
    array = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    np.testing.assert_array_equal(Preprocess(config).pixels(array), array[2:6, 2:6])


@pytest.mark.parametrize("resize", ["crop", "squash", "pad", "naflex"])
@pytest.mark.parametrize("backend", ["pillow", "tensor", "tensorflow"])
def test_very_long_images_take_little_memory(resize, backend):
    if resize == "pad" and backend != "pillow":
        return
    options = {"kernel": "bilinear", "antialias": False} if backend == "tensorflow" else {}
    if resize == "naflex":
        options |= {"patch_size": 16, "max_patches": 16}
    config = PreprocessConfig(image_size=224, resize=resize, backend=backend, **options)
    colour = np.uint8([[[10, 200, 90]]])
    long = 2_000_000 if backend == "pillow" and resize != "naflex" else 80_000
    for shape in ((1, 1), (long, 1), (1, long)):
        pixels = Preprocess(config).pixels(np.broadcast_to(colour, (*shape, 3)))
        assert resize == "naflex" or pixels.shape == (224, 224, 3)
        middle = pixels[(pixels.shape[0] - 1) // 2, (pixels.shape[1] - 1) // 2]
        np.testing.assert_allclose(middle, colour[0, 0], atol=1)


@pytest.mark.parametrize("turned", [False, True])
def test_the_middle_of_a_long_image_is_what_the_whole_shows(turned):
    y, x = np.mgrid[:6, :2001]
    waves = 127 + 100 * np.sin(np.stack([x / 9, y / 7, (x + y) / 13], -1))
    image = Image.fromarray(waves.astype(np.uint8))
    image = image.transpose(Image.Transpose.ROTATE_90) if turned else image
    config = PreprocessConfig(image_size=64, resize="crop")
    whole = Preprocess(config).pixels(image).astype(int)
    middle = Preprocess(config, max_pixels=100_000).pixels(image)
    assert abs(whole - middle).max() <= 3
    assert abs(whole - whole[::-1, ::-1]).max() > 20


# ---------------------------------------------------------------------------- opening


def png(width, height, depth, color, rows: bytes) -> bytes:
    """A PNG written by hand, for what Pillow does not write."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_transparency_lies_on_the_background():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([0] * 9 + [255, 0, 0] + [0] * (256 * 3 - 12))
    keyed = Image.new("RGB", (4, 4), (1, 2, 3))
    for image, expected in [
        (clear, (10, 20, 30)),
        (clear.convert("LA"), (10, 20, 30)),
        (saved(palette, "PNG", transparency=3), (10, 20, 30)),
        (saved(palette, "GIF", transparency=3), (10, 20, 30)),
        (saved(keyed, "PNG", transparency=(1, 2, 3)), (10, 20, 30)),
        (saved(keyed, "PNG", transparency=(9, 9, 9)), (1, 2, 3)),
        (half, (133, 10, 15)),
    ]:
        got = open_image(image, background=(10, 20, 30))
        assert got.mode == "RGB"
        np.testing.assert_allclose(np.asarray(got)[1, 1], expected, atol=1)
    assert open_image(clear, background=None).getpixel((0, 0)) == (255, 0, 0)


def test_sixteen_bits_and_floats_are_scaled():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    expected = np.rint(ramp / 257)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in ramp)
    for image in (
        png(16, 16, 16, 0, rows),
        saved(Image.fromarray(ramp), "TIFF"),
        Image.fromarray(ramp.astype(np.int32)),
        Image.fromarray((ramp / 65535).astype(np.float32)),
        Image.fromarray((ramp / 257).astype(np.float32)),
    ):
        got = np.asarray(open_image(image))
        np.testing.assert_allclose(got, np.repeat(expected[..., None], 3, -1), atol=1)
    holes = np.full((4, 4), np.nan, np.float32)
    assert np.asarray(open_image(Image.fromarray(holes))).max() == 0


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV", "LAB", "P"])
def test_white_stays_white_in_every_mode(mode):
    white = Image.new("RGB", (4, 4), (255, 255, 255))
    if mode == "LAB":  # which Pillow converts by colour profiles alone
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(white, srgb, lab, outputMode="LAB")
        assert image.mode == "LAB"
    else:
        image = white.convert(mode)
    assert min(open_image(image).getpixel((0, 0))) >= 254


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_image(data)), upright)


def test_callers_image_is_left_alone():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    open_image(image)
    assert image.mode == "RGBA"


def test_grey_and_four_channel_arrays():
    grey = np.full((3, 3), 7, np.uint8)
    for array in (grey, grey[..., None]):
        np.testing.assert_array_equal(np.asarray(open_image(array)), np.full((3, 3, 3), 7))
    assert open_image(np.zeros((3, 3, 4), np.uint8)).getpixel((0, 0)) == (255, 255, 255)


def test_unreadable_images_are_named(tmp_path):
    good = saved(Image.fromarray(np.zeros((64, 64, 3), np.uint8)), "PNG")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    jpeg = saved(Image.fromarray(noise), "JPEG")
    for name, data in {
        "empty.png": b"",
        "text.png": b"not an image at all",
        "head.png": good[:30],
        "half.png": good[: len(good) // 2],
        "half.jpg": jpeg[: len(jpeg) // 2],
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=name):
            open_image(tmp_path / name)
    with pytest.raises(DataError, match=r"no image .*missing\.png"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(DataError, match="folder"):
        open_image(tmp_path)
    with pytest.raises(DataError, match="image 1 is not an image"):
        Preprocess(PreprocessConfig(image_size=8))([good, b"junk"])


def test_arrays_of_another_kind_are_refused():
    for array, message in [
        (np.zeros((4, 4, 3), np.float32), "float32, not uint8"),
        (np.zeros((4, 4, 5), np.uint8), r"\(4, 4, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.zeros(4, np.uint8), r"shape \(4,\)"),
    ]:
        with pytest.raises(DataError, match=message):
            open_image(array)


def test_decompression_bombs_are_refused_and_the_limit_moves():
    bomb = png(30_000, 30_000, 8, 0, b"\0")  # 900 million pixels in a few bytes
    with pytest.raises(DataError, match="raise max_pixels"):
        open_image(bomb)
    image = Image.new("RGB", (100, 100))
    with pytest.raises(DataError, match=r"10,000 pixels, over the limit of 9,999"):
        open_image(image, max_pixels=9_999)
    assert open_image(image, max_pixels=10_000).size == (100, 100)
    with pytest.raises(DataError, match="limit of 99"):
        Preprocess(PreprocessConfig(image_size=8), max_pixels=99)(image)


def test_configs_that_cannot_be():
    for changes, message in [
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": 8, "short_side": 7}, "short_side 7"),
        ({"std": (0.5, 0.0, 0.5)}, "above 0"),
        ({"backend": "tensor", "kernel": "lanczos", "antialias": False}, "lanczos"),
        ({"backend": "tensorflow", "kernel": "bilinear"}, "antialias=False"),
        ({"backend": "tensorflow", "antialias": False}, 'kernel="bilinear"'),
    ]:
        with pytest.raises(ConfigError, match=message):
            Preprocess(PreprocessConfig(**changes))


def test_the_tensor_backend_is_that_of_the_fast_processors():
    values = {"size": {"shortest_edge": 224}, "crop_size": 224, "do_resize": True}
    slow, fast = (
        huggingface_preprocess(values | {"image_processor_type": f"CLIPImageProcessor{end}"}, "x")
        for end in ("", "Fast")
    )
    assert slow.backend == "pillow"
    assert with_options(slow, "tensor") == fast
    assert with_options(fast, "pillow") == slow
