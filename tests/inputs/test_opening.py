"""Files as they come: right, or refused with their name."""

import contextlib
import io
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from vlm.config import PreprocessConfig
from vlm.errors import DataError
from vlm.heads.inputs import kind
from vlm.inputs.folders import is_image_name
from vlm.inputs.opening import (
    FORMATS,
    SUFFIXES,
    extension_of,
    is_image,
    one_or_many,
    open_image,
)
from vlm.inputs.preprocess import Preprocess


def saved(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


@pytest.fixture(scope="module")
def photo():
    pixels = np.kron(np.random.default_rng(0).integers(0, 256, (12, 16, 3)), np.ones((8, 8, 1)))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def files(photo):
    """The photo in every format that is read."""
    return {form: saved(photo, form) for form in FORMATS}


@pytest.fixture
def lenient(monkeypatch):
    """A program that has set LOAD_TRUNCATED_IMAGES of Pillow."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)


def test_every_format_is_read(files, photo):
    for form, data in files.items():
        got = np.asarray(open_image(data), float)
        assert abs(got - np.asarray(photo, float)).mean() < 12, form
    assert all(suffix == suffix.lower() and suffix[0] == "." for suffix in SUFFIXES)


# ------------------------------------------------------------------------------- damaged files


def flipped(data: bytes, rng, first: int) -> bytes:
    out = bytearray(data)
    out[rng.integers(first, len(data) - 20)] ^= 1 << rng.integers(8)
    return bytes(out)


def test_a_flipped_byte_of_a_png_never_gives_half_an_image(files):
    rng, refused = np.random.default_rng(0), 0
    for _ in range(200):
        data = flipped(files["PNG"], rng, 60)
        try:
            expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        except Exception:
            with pytest.raises(DataError, match="photo cannot be decoded"):
                open_image(data, name="photo")
            refused += 1
        else:
            np.testing.assert_array_equal(np.asarray(open_image(data)), expected)
    assert refused > 150


def test_an_image_whose_file_is_damaged_is_refused_as_pil_image_too(files):
    data = bytearray(files["PNG"])
    data[len(data) // 2] ^= 1
    with pytest.raises(DataError, match="cannot be decoded"):
        open_image(Image.open(io.BytesIO(bytes(data))))


@pytest.mark.parametrize("form", sorted(set(FORMATS) - {"JPEG2000"}))  # its reader fills up alone
def test_truncated_files_are_refused_also_where_pillow_is_lenient(files, form, lenient):
    data = files[form]
    half = data[: len(data) * 2 // 3]
    with pytest.raises(DataError, match="photo"):
        open_image(half, name="photo")
    if form not in ("AVIF", "WEBP"):  # which are not even opened
        with pytest.raises(DataError, match="photo"):
            open_image(Image.open(io.BytesIO(half)), name="photo")
    if form in ("JPEG", "PNG"):  # and the setting is as it was
        Image.open(io.BytesIO(half)).load()
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_damaged_metadata_leaves_the_pixels(photo):
    data = saved(photo, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40)
    plain = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(np.asarray(open_image(data)), plain)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_a_tiff_is_turned_once(photo, compression):
    data = saved(photo, "TIFF", compression=compression, tiffinfo={0x0112: 6})
    expected = np.rot90(np.asarray(photo), -1)
    np.testing.assert_array_equal(np.asarray(open_image(data)), expected)
    image = Image.open(io.BytesIO(data))
    image.load()
    np.testing.assert_array_equal(np.asarray(open_image(image)), expected)


def damaged(data: bytes, at: float) -> bytes:
    out = bytearray(data)
    start = int(len(out) * at)
    out[start : start + 60] = bytes(60)
    return bytes(out)


def test_every_reader_fails_by_one_sentence(files):
    for form, data in files.items():
        for at in (0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9):
            with contextlib.suppress(DataError):
                assert open_image(damaged(data, at), name="photo").mode == "RGB", form


# --------------------------------------------------------------------------- foreign and large


def test_other_formats_are_not_even_tried(monkeypatch, photo):
    def never(*args, **options):
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.check_call", never)
    monkeypatch.setattr("subprocess.Popen", never)
    eps = saved(photo, "EPS")
    with pytest.raises(DataError, match=r"photo is PostScript, not an image of JPEG, PNG, .*QOI"):
        open_image(eps, name="photo")
    for form in ("TGA", "PCX", "ICNS", "DDS", "SGI", "MSP", "XBM"):
        image = photo.convert("1") if form in ("MSP", "XBM") else photo
        image = image.resize((128, 128)) if form == "ICNS" else image
        with pytest.raises(DataError, match="photo is not an image, or a damaged one, of JPEG"):
            open_image(saved(image, form), name="photo")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE HTML><html></html>", "is a web page"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is an SVG drawing"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><svg/>", "is XML, such as an SVG drawing"),
        (b"%PDF-1.7\n", "is a PDF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is HEIC"),
        (b"GIF89a", "is not an image, or a damaged one"),
        (b"RIFF\x80\0\0\0WEBPVP8 " + bytes(99), "is damaged (could not create decoder object)"),
        (b"just words", "is not an image, or a damaged one"),
    ],
)
def test_what_is_found_under_the_name_of_an_image(data, message):
    with pytest.raises(DataError, match="photo") as caught:
        open_image(data, name="photo")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_bombs_in_the_metadata(files):
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000)))
    for at in (33, len(files["PNG"]) - 12):  # before the pixels, and behind them
        data = files["PNG"][:at] + text + files["PNG"][at:]
        with pytest.raises(DataError, match="photo"):
            open_image(data, name="photo")
    many = files["PNG"][:-12] + 70 * chunk(b"tEXt", b"Comment\0" + b"x" * 999_000)
    with pytest.raises(DataError, match="photo cannot be decoded"):
        open_image(many + files["PNG"][-12:], name="photo")


def test_a_frame_larger_than_its_screen(photo):
    data = bytearray(saved(photo, "GIF"))
    at = data.index(b"\x2c\0\0\0\0")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"  # 65,535 x 65,535
    with pytest.raises(DataError, match="over the limit"):
        open_image(bytes(data))


def test_of_many_frames_the_first_is_taken(photo):
    blank = Image.new("RGB", photo.size, "white")
    for form in ("GIF", "PNG", "WEBP", "TIFF", "AVIF"):
        options = {} if form == "GIF" else {"lossless": True} if form == "WEBP" else {}
        data = saved(photo, form, save_all=True, append_images=[blank] * 3, **options)
        got = np.asarray(open_image(data), float)
        assert abs(got - np.asarray(photo, float)).mean() < 12, form


# ------------------------------------------------------------------------------- from the disk


def test_names_and_places(tmp_path, photo):
    odd = tmp_path / "café 象 🦄.png"
    photo.save(odd)
    np.testing.assert_array_equal(np.asarray(open_image(str(odd))), np.asarray(photo))
    (tmp_path / "link.png").symlink_to(odd)
    assert open_image(tmp_path / "link.png").size == photo.size
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"there is no image .*gone\.png"):
        open_image(tmp_path / "gone.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "a file").touch()
    for wrong in (tmp_path / "loop.png", tmp_path / "a file" / "x.png", "a\0b.png", "x" * 300):
        with pytest.raises(DataError, match=r"cannot be read|there is no image"):
            open_image(wrong)


def test_a_file_without_permission(tmp_path, photo, monkeypatch):
    photo.save(tmp_path / "a.png")

    def refuse(self):  # a suite that runs as root may read everything
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("etils.epath.gpath.PosixGPath.read_bytes", refuse)
    with pytest.raises(DataError, match=r"a\.png cannot be read \(Permission denied\)"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("address", ["https://example.org/cat.jpg", "HTTP://x/y.png", "ftp://x/y"])
def test_addresses_of_the_web(address):
    with pytest.raises(DataError, match=r"web address.*download it first"):
        open_image(address)


# ------------------------------------------------------------------------ what counts as an image


@pytest.mark.untyped
def test_one_rule_for_what_an_image_is(tmp_path, files, photo):
    array = np.asarray(photo)
    one = ["a.png", tmp_path, files["PNG"], photo, array, array[..., 0], array[..., :1]]
    for image in one:
        assert is_image(image)
        assert len(list(one_or_many(image))) == 1
        if not isinstance(image, str):  # a text, for heads that take texts too
            assert kind(image, "add") == "image"
    for many in (one, tuple(one), (x for x in one), np.stack([array] * 7), np.array(["a.png"] * 7)):
        assert not is_image(many)
        assert len(list(one_or_many(many))) == 7
    for other in (5, None, 2.5, object(), io.BytesIO(files["PNG"]), open):
        assert not is_image(other)
        name = type(other).__name__
        with pytest.raises(DataError, match=f"images is a {name}: give a PIL image"):
            one_or_many(other)
        with pytest.raises(DataError, match=f"add got a {name}"):
            kind(other, "add")
        with pytest.raises(DataError, match=f"image 1 is a {name}: give a PIL image"):
            Preprocess(PreprocessConfig(image_size=8))([photo, other])


@pytest.mark.parametrize("form", FORMATS)
def test_the_ending_that_is_written_for_a_format_is_read(form):
    data = saved(Image.new("RGB", (9, 8), (200, 10, 10)), form)
    assert f".{extension_of(data)}" in FORMATS[form]
    assert is_image_name(f"x.{extension_of(data)}")


def test_an_mpo_file_is_a_jpeg():
    image, out = Image.new("RGB", (9, 8), (200, 10, 10)), io.BytesIO()
    image.save(out, "MPO", save_all=True, append_images=[image])
    assert extension_of(out.getvalue()) == "jpg"
    with pytest.raises(DataError, match="not an image"):
        extension_of(b"just words")


@pytest.mark.parametrize(
    ("data", "kind", "extra", "module"),
    [
        (b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf", "HEIC", "heif", "pillow_heif"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf", "HEIC", "heif", "pillow_heif"),
        (b"\xff\x0a\x98\xc0", "JPEG XL", "jxl", "pillow_jxl"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL", "jxl", "pillow_jxl"),
    ],
)
def test_a_format_of_an_extra_names_it(monkeypatch, data, kind, extra, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError) as error:
        open_image(data, name="photo")
    expected = f'photo is {kind}, which needs another package: run pip install "vlm-jax[{extra}]"'
    assert str(error.value) == expected


def test_formats_of_extras_are_opened_by_their_packages(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    pytest.importorskip("pillow_jxl")
    heif.register_heif_opener()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8))
    for form, ending in (("HEIF", "heic"), ("JXL", "jxl")):
        image.save(tmp_path / f"x.{ending}", form)
        data = (tmp_path / f"x.{ending}").read_bytes()
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(open_image(data)), expected)
        assert extension_of(data) == ending
        assert is_image_name(f"x.{ending}")
        with pytest.raises(DataError, match=r"damaged|cannot be decoded"):
            open_image(data[: len(data) // 2])
