"""Copies of images are found whatever file they are in, and other images are not taken for them."""

import io

import numpy as np
import pytest
from PIL import Image

from vlm.data import duplicates
from vlm.data.duplicates import copied_from, copy_groups, thumbnails


def picture(seed, size=(192, 128), strength=50):
    """Smooth blobs of colour, as a photograph has."""
    rng = np.random.default_rng(seed)
    pixels = 128 + strength * rng.standard_normal((8, 12, 3))
    small = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def encoded(image, form="JPEG", **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


@pytest.mark.parametrize("rows", [4, 512])
def test_copies_in_any_file_are_one_group(rows, monkeypatch, tmp_path):
    monkeypatch.setattr(duplicates, "ROWS", rows)
    images: list = [picture(seed) for seed in range(30)]
    first = images[7]
    first.save(tmp_path / "first.png")
    copies = [
        tmp_path / "first.png",
        encoded(first, quality=75),
        encoded(first.resize((96, 64), Image.Resampling.LANCZOS), quality=85),
        encoded(first.resize((300, 200), Image.Resampling.BICUBIC), "WEBP", quality=80),
        np.asarray(first),
    ]
    groups = copy_groups(thumbnails(images + copies))
    assert len(set(groups[:30].tolist())) == 30
    assert set(groups[30:].tolist()) == {groups[7]}
    assert sorted(set(groups.tolist())) == list(range(30))
    found = copied_from(thumbnails(copies + images[:3]), thumbnails(images[5:]))
    assert found.tolist() == [True] * 5 + [False] * 3


def test_flat_images_are_copies_only_if_equal():
    """Water in satellite images, or snow: alike in colour, and each another image."""
    rng = np.random.default_rng(0)
    sea = [
        Image.fromarray((np.array([30, 60, 110]) + rng.normal(0, 4, (64, 64, 3))).astype(np.uint8))
        for _ in range(20)
    ]
    plain = [Image.new("RGB", (20, 20), (200, 30, 30 + i)) for i in (0, 1, 0)]
    groups = copy_groups(thumbnails([*sea, *plain]))
    assert len(set(groups[:20].tolist())) == 20
    assert groups[20] == groups[22] != groups[21]


def test_of_nothing():
    none = thumbnails([])
    assert copy_groups(none).shape == (0,)
    assert copied_from(none, thumbnails([picture(0)])).shape == (0,)
    assert copied_from(thumbnails([picture(0)]), none).tolist() == [False]
