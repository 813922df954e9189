"""Batches of several image sequence lengths: one budget of patches, exact for any process count."""

import dataclasses
import json

import numpy as np
import pytest
from kinds import TOKENIZER, write_tar
from PIL import Image

from vlm.config import AugmentConfig, DataConfig, FieldFilter, PreprocessConfig
from vlm.config.batch_sizes import BatchSize
from vlm.data.batch_schedule import BatchSchedule
from vlm.data.pipeline import train_batches
from vlm.errors import DataError
from vlm.inputs.preprocess import Preprocess

SIZES = (BatchSize(4, 16), BatchSize(8, 8), BatchSize(16, 4))
SCHEDULE = BatchSchedule(SIZES, seed=3)
PREPROCESS = Preprocess(
    PreprocessConfig(image_size=16, resize="naflex", patch_size=4, max_patches=16)
)
COUNT, BROKEN = 40, (5, 6, 21)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty pictures of many aspects in a table and in four shards, three of them corrupt."""
    path = tmp_path_factory.mktemp("mixed")
    rng, members = np.random.default_rng(0), []
    for number in range(COUNT):
        height, width = rng.integers(5, 60, 2)
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(path / f"{number:02d}.png")
        data = b"no image" if number in BROKEN else (path / f"{number:02d}.png").read_bytes()
        fields = json.dumps({"score": number % 4}).encode()
        text = f"picture {number}".encode()
        members.append([(f"{number:02d}.{e}", d) for e, d in
                        (("json", fields), ("png", data), ("txt", text))])  # fmt: skip
    rows = [{"image": f"{n:02d}.png", "caption": f"picture {n}"} for n in range(COUNT)]
    (path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for shard in range(4):
        write_tar(path / f"{shard}.tar", [m for parts in members[shard::4] for m in parts])
    return path


def config(folder, access: str, **changes) -> DataConfig:
    source = folder if access == "random" else folder / "{0..3}.tar"
    options = {"prefetch": 1} | ({"shuffle": 4} if access == "stream" else {}) | changes
    plain = AugmentConfig(crop=None)
    return DataConfig(str(source), access=access, augment=plain, max_bad_share=0.9, **options)


def opened(data: DataConfig, schedule=SCHEDULE, processes: int = 1, process: int = 0):
    options = {"process_index": process, "process_count": processes}
    size = schedule.sizes[0].pairs // processes
    return train_batches(
        data, PREPROCESS, TOKENIZER, batch_size=size, seed=0, schedule=schedule, **options
    )


def take(iterator, count: int) -> list[dict]:
    found = [next(iterator) for _ in range(count)]
    iterator.close()
    return found


def assert_equal(ours: list[dict], theirs: list[dict]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one["tokens"], other["tokens"])
        for x, y in zip(one["images"], other["images"], strict=True):
            np.testing.assert_array_equal(x, y)


# ------------------------------------------------------------------------------ schedule


def test_each_round_has_each_size_once_in_an_order_of_its_own():
    rounds = [tuple(SCHEDULE.at(3 * r + i) for i in range(3)) for r in range(20)]
    assert all(sorted(found) == sorted(SIZES) for found in rounds)
    assert len(set(rounds)) > 2
    assert rounds != [
        tuple(BatchSchedule(SIZES, 4).at(3 * r + i) for i in range(3)) for r in range(20)
    ]


def test_pairs_and_steps_are_counted_exactly():
    total = 0
    for step in range(30):
        assert SCHEDULE.pairs_before(step) == total
        for first in (0, 2, 7):
            assert SCHEDULE.steps_of(total - SCHEDULE.pairs_before(first), first) == step - first
        assert SCHEDULE.steps_of(total + 1) == step  # one more pair is no more step
        total += SCHEDULE.at(step).pairs
    assert SCHEDULE.steps_of(-1, 5) == -1
    assert SCHEDULE.divisor == 4


def test_a_length_that_is_listed_twice_is_used_twice_as_often():
    twice = BatchSchedule([*SIZES, SIZES[0]], 0)
    assert [twice.at(i) for i in range(40)].count(SIZES[0]) == 20


# ------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("access", ["random", "stream"])
def test_images_are_resized_to_the_length_of_their_batch(folder, access):
    for step, batch in enumerate(take(opened(config(folder, access)), 9)):
        pairs, patches = SCHEDULE.at(step)
        assert batch["images"].pixels.shape == (pairs, patches, 16, 3)
        assert batch["tokens"].shape == (pairs, 12)
        for row, text in enumerate(TOKENIZER.decode(batch["tokens"])):
            picture = folder / f"{int(text.split()[-1]):02d}.png"
            alone = PREPROCESS.at_length(patches)
            wanted = PREPROCESS.blank(1) if patches is None else alone.blank(1)
            alone.put(wanted, 0, alone.pixels(picture))
            for x, y in zip(batch["images"], wanted, strict=True):
                np.testing.assert_array_equal(x[row], y[0])


def test_an_epoch_has_each_example_at_most_once(folder):
    data = dataclasses.replace(config(folder, "random"), source=str(folder))
    iterator = train_batches(
        data, PREPROCESS, TOKENIZER, batch_size=4, seed=0, schedule=SCHEDULE, epochs=1
    )
    assert len(iterator) == SCHEDULE.steps_of(COUNT)
    texts = [t for b in take(iterator, len(iterator)) for t in TOKENIZER.decode(b["tokens"])]
    assert len(set(texts)) == len(texts) == iterator.samples <= COUNT


@pytest.mark.parametrize("access", ["random", "stream"])
def test_processes_and_workers_make_the_same_batches(folder, access):
    whole = take(opened(config(folder, access)), 8)
    parts = [take(opened(config(folder, access), processes=2, process=i), 8) for i in range(2)]
    for one, *shards in zip(whole, *parts, strict=True):
        tokens = np.concatenate([shard["tokens"] for shard in shards])
        np.testing.assert_array_equal(tokens, one["tokens"])
        pixels = np.concatenate([shard["images"].pixels for shard in shards])
        np.testing.assert_array_equal(pixels, one["images"].pixels)


@pytest.mark.slow
@pytest.mark.parametrize("access", ["random", "stream"])
def test_worker_processes_make_the_same_batches(folder, access):
    whole = take(opened(config(folder, access)), 6)
    assert_equal(take(opened(config(folder, access, workers=2)), 6), whole)


@pytest.mark.parametrize("access", ["random", "stream"])
@pytest.mark.parametrize("at", [1, 4, 6])
def test_a_restored_iterator_continues_at_the_sample(folder, access, at):
    whole = opened(config(folder, access))
    for _ in range(at):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    again = opened(config(folder, access))
    again.set_state(state)
    assert again.samples == SCHEDULE.pairs_before(at)
    assert_equal(take(again, 5), take(whole, 5))


def test_filters_and_bad_samples_do_not_move_an_image_to_another_length(folder):
    """Samples are decoded ahead for the batch that they were expected in."""
    kept = (FieldFilter("score", at_least=1),)
    batches = take(opened(config(folder, "stream", filters=kept)), 9)
    numbers = [int(t.split()[-1]) for b in batches for t in TOKENIZER.decode(b["tokens"])]
    assert not {n for n in numbers if n % 4 == 0 or n in BROKEN}
    for step, batch in enumerate(batches):
        assert batch["images"].mask.shape == SCHEDULE.at(step)


def test_other_lengths_continue_the_pass(folder):
    iterator = opened(config(folder, "random"))
    for _ in range(2):
        next(iterator)
    state = iterator.get_state()
    iterator.close()
    other = BatchSchedule([BatchSize(4, 16), BatchSize(8, 8)], seed=3)
    again = opened(config(folder, "random"), other)
    again.resume(state)
    assert again.position_change == "continues at step 2 (changed: --sequence-lengths)"
    assert again.get_state()["position"] == state["position"]
    again.close()


def test_a_batch_that_is_larger_than_the_data_is_refused(folder):
    large = BatchSchedule([BatchSize(8, 16), BatchSize(64, 2)], seed=0)
    with pytest.raises(DataError, match="the global batch of 64 is larger than the 40 examples"):
        opened(config(folder, "random"), large)
