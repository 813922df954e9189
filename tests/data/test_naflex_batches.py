"""Images of any aspect in batches: cut as they are for encoding, cropped in their own aspect."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import TOKENIZER, write_tar
from PIL import Image

from vlm.config import AugmentConfig, DataConfig, PreprocessConfig
from vlm.data.pipeline import eval_batches, train_batches
from vlm.data.transform_example import ExampleTransform
from vlm.data.transforms import DRAWS, Augment
from vlm.inputs.preprocess import Preprocess

SIZES = [(40, 10), (12, 60), (30, 30), (25, 33), (7, 90), (64, 48), (5, 5), (50, 21)]  # w, h
PREPROCESS = Preprocess(
    PreprocessConfig(image_size=16, resize="naflex", patch_size=4, max_patches=16)
)
PLAIN = AugmentConfig(crop=None)
STRONG = AugmentConfig(crop=(0.4, 0.9), flip=True, jitter=0.3, hue=0.1, randaugment=(2, 9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight pictures of as many aspects, in a table and in two shards."""
    path = tmp_path_factory.mktemp("aspects")
    rng, rows = np.random.default_rng(0), []
    for number, (width, height) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(path / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": f"picture {number}", "split": "train"})
    rows += [rows[number] | {"split": "test"} for number in range(3)]
    (path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for shard in range(2):
        names = [f"{number}.png" for number in range(4 * shard, 4 * shard + 4)]
        members = [(name, (path / name).read_bytes()) for name in names]
        texts = [(f"{name[0]}.txt", f"picture {name[0]}".encode()) for name in names]
        write_tar(path / f"{shard}.tar", sorted(members + texts))
    return path


def config(folder, kind: str, augment: AugmentConfig, **changes) -> DataConfig:
    source = folder if kind == "random" else folder / "{0..1}.tar"
    options = {"access": kind, "prefetch": 1} | changes
    if kind == "stream":
        options["shuffle"] = 4
    return DataConfig(str(source), augment=augment, **options)


def first(data: DataConfig, count: int = 1) -> list[dict]:
    batches = train_batches(data, PREPROCESS, TOKENIZER, batch_size=4, seed=0)
    found = [next(batches) for _ in range(count)]
    batches.close()
    return found


def assert_encoded(images, row: int, file) -> None:
    """A row is what encoding makes of that image, but for the length that it is padded to."""
    theirs, count = PREPROCESS(file), int(images.mask[row].sum())
    assert count == theirs.mask.sum() <= 16
    normal = PREPROCESS.normalize(images)
    for ours, wanted in zip(normal, theirs, strict=True):
        np.testing.assert_array_equal(ours[row, :count], wanted[0, :count])
    assert not images.mask[row, count:].any()
    assert not images.pixels[row, count:].any()


@pytest.mark.parametrize("kind", ["random", "stream"])
def test_without_augmentation_a_batch_is_what_is_encoded(folder, kind):
    for batch in first(config(folder, kind, PLAIN), 2):
        images = batch["images"]
        assert images.pixels.shape == (4, 16, 16, 3)
        assert images.pixels.dtype == np.uint8
        for row, text in enumerate(TOKENIZER.decode(batch["tokens"])):
            assert_encoded(images, row, folder / f"{text.split()[-1]}.png")


def test_evaluation_sees_what_is_encoded_and_blanks_are_something_to_see(folder):
    data = config(folder, "random", STRONG)
    (batch,) = eval_batches(data, PREPROCESS, TOKENIZER, batch_size=4)
    for row in range(3):
        assert_encoded(batch["images"], row, folder / f"{row}.png")
    assert batch["mask"].tolist() == [True, True, True, False]
    assert batch["images"].mask[3].sum() == 1


def test_worker_processes_change_nothing(folder):
    data = config(folder, "stream", STRONG)
    expected, got = first(data, 3), first(dataclasses.replace(data, workers=2), 3)
    for a, b in zip(expected, got, strict=True):
        assert type(a["images"]) is type(b["images"])
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(x, y)


def test_memory_is_counted_whole():
    images = ExampleTransform([DataConfig()], PREPROCESS).blank(3)
    assert sum(x.nbytes for x in images) == 3 * PREPROCESS.image_bytes
    square = Preprocess(PreprocessConfig(image_size=8))
    assert square.blank(2).nbytes == 2 * square.image_bytes == 2 * 8 * 8 * 3


SIDES = st.integers(1, 400)


@given(SIDES, SIDES, st.lists(st.floats(0, 1, exclude_max=True), min_size=DRAWS, max_size=DRAWS))
@settings(max_examples=60, deadline=None)
def test_a_crop_keeps_the_aspect_of_its_image(width, height, u):
    """Also where that is far from a square's, which a crop of squares would cut off."""
    augment = Augment(AugmentConfig(crop=(0.5, 1.0)), PREPROCESS)
    left, top, right, bottom = augment._crop(width, height, u)
    assert 0 <= left < right <= width * (1 + 1e-9)
    assert 0 <= top < bottom <= height * (1 + 1e-9)
    ratio = (right - left) / (bottom - top) / (width / height)
    assert 3 / 4 * (1 - 1e-9) <= ratio <= 4 / 3 * (1 + 1e-9)
    assert (right - left) * (bottom - top) >= 0.5 * width * height * (1 - 1e-9)
    made = augment._target_size((left, top, right, bottom))
    assert made[0] * made[1] <= 16 * 4**2
    assert made[0] % 4 == made[1] % 4 == 0
    decoded = augment.smallest(width, height, np.array(u))
    fraction = next((n for n in (8, 4, 2) if decoded == (width // n, height // n)), 1)
    if fraction > 1:  # the crop still has every pixel that is made of it
        assert (right - left) / fraction >= made[0]
        assert (bottom - top) / fraction >= made[1]
