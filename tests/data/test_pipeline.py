import dataclasses
import itertools
import json
import time

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from vlm.config import AugmentConfig, DataConfig, PreprocessConfig
from vlm.data.examples import captions_of
from vlm.data.pipeline import TrainBatches, count_examples, eval_batches, train_batches
from vlm.data.sources import open_source
from vlm.errors import ConfigError, DataError
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import train_bpe

COUNT = 37
TOKENIZER = train_bpe([f"picture {i}" for i in range(COUNT)], 300, 12)
PREPROCESS = Preprocess(PreprocessConfig(image_size=8))


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    """37 pictures whose caption is its number, with every augmentation on."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(COUNT):
        size = rng.integers(9, 20, 2)
        array = rng.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(array).save(folder / f"{i}.png")
        split = "test" if i >= 30 else "train"
        rows += [{"image": f"{i}.png", "caption": f"picture {i}", "other": f"other {i}"}]
        rows[-1]["split"] = split
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return DataConfig(
        str(folder),
        augment=AugmentConfig(crop=(0.5, 1.0), jitter=0.3, hue=0.1, flip=True),
        prefetch=0,
    )


def make(config, batch_size=4, seed=0, **options):
    return train_batches(config, PREPROCESS, TOKENIZER, batch_size=batch_size, seed=seed, **options)


def numbers(batch) -> list[int]:
    return [int(text.split()[-1]) for text in TOKENIZER.decode(batch["tokens"])]


def assert_equal(a, b):
    a, b = ({k: v for k, v in x.items() if k != "bad"} for x in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_batches_have_the_promised_form(config):
    batch = next(make(config))
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        "images": ((4, 8, 8, 3), np.uint8),
        "tokens": ((4, 12), np.int32),
    }


def test_every_epoch_shows_every_example_once_in_another_order(config):
    batches = itertools.islice(make(config, batch_size=7), 30 * 3 // 7 + 1)
    seen = [n for batch in batches for n in numbers(batch)]
    epochs = [seen[:30], seen[30:60], seen[60:90]]
    for epoch in epochs:
        assert sorted(epoch) == list(range(30))
    assert epochs[0] != epochs[1] != epochs[2] != list(range(30))


def test_seed_decides_and_decides_all(config):
    assert_equal(next(make(config)), next(make(config)))
    a, b = next(make(config, batch_size=30)), next(make(config, batch_size=30, seed=1))
    assert numbers(a) != numbers(b)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_a_global_batch_is_the_same_for_any_number_of_processes(config, count):
    whole = list(itertools.islice(make(config, batch_size=6), 12))
    parts = [
        list(
            itertools.islice(
                make(config, batch_size=6 // count, process_index=k, process_count=count), 12
            )
        )
        for k in range(count)
    ]
    for step in range(12):
        joined = {
            name: np.concatenate([part[step][name] for part in parts]) for name in whole[step]
        }
        assert_equal(joined, whole[step])


@pytest.mark.parametrize(
    "changes",
    [{}, {"prefetch": 3}, {"cache": True}, {"cache": True, "prefetch": 2}],
    ids=["plain", "threads", "cache", "cache and thread"],
)
def test_resuming_anywhere_gives_the_remaining_batches_bit_for_bit(config, changes):
    expected = list(itertools.islice(make(config), 24))
    changed = dataclasses.replace(config, **changes)
    iterator = make(changed)
    rng = np.random.default_rng(0)
    states = [json.loads(json.dumps(iterator.get_state()))]
    for batch in expected:
        assert_equal(next(iterator), batch)
        states.append(json.loads(json.dumps(iterator.get_state())))
    for start in rng.integers(0, 24, 6):
        fresh = make(changed)
        for resumed in (fresh, iterator):  # a new one, and one that has gone elsewhere
            resumed.set_state(states[start])
            for batch in expected[start : start + 3]:
                assert_equal(next(resumed), batch)
        fresh.close()
    iterator.close()


def test_worker_processes_change_nothing(config):
    expected = list(itertools.islice(make(config), 8))
    iterator = make(dataclasses.replace(config, workers=2, prefetch=1))
    for batch in expected[:5]:
        assert_equal(next(iterator), batch)
    state = iterator.get_state()
    iterator.close()
    resumed = make(dataclasses.replace(config, workers=1))  # of another count
    resumed.set_state(state)
    for batch in expected[5:]:
        assert_equal(next(resumed), batch)
    resumed.close()


def test_orbax_saves_and_restores_the_iterator(config, tmp_path):
    iterator = make(config)
    for _ in range(3):
        next(iterator)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        expected = next(iterator)
        fresh = make(config)
        restore = grain.checkpoint.CheckpointRestore(fresh)
        manager.restore(3, args=ocp.args.Composite(data=restore))
    assert_equal(next(fresh), expected)


@pytest.mark.untyped
def test_a_state_of_something_else_is_refused(config):
    for state in ({}, {"step": -1}, {"step": "3"}, None):
        with pytest.raises(DataError, match="not the state"):
            make(config).set_state(state)


def test_a_run_that_has_ended_is_resumed_at_its_end(config):
    iterator = make(config, batch_size=7, epochs=1)
    batches = list(iterator)
    end = iterator.get_state()
    fresh = make(config, batch_size=7, epochs=1)
    assert len(batches) == len(fresh) == 4
    fresh.set_state(end)
    assert list(fresh) == []
    fresh.set_state({**end, "step": 3, "position": 21})
    assert_equal(*fresh, batches[3])
    with pytest.raises(DataError, match="not the state"):
        fresh.set_state({**end, "step": 5})
    endless = make(config, batch_size=7)
    endless.set_state({**end, "step": 5})  # of a run without an end it is one
    assert sorted(numbers(next(endless))) != []


def test_each_batch_is_finished_in_this_process(config):
    finish = lambda batch: {**batch, "count": len(batch["tokens"])}  # noqa: E731
    assert next(make(config, finish=finish))["count"] == 4


def test_epochs_end_the_iterator(config):
    assert len(list(make(config, batch_size=7, epochs=2))) == 60 // 7
    assert len(make(config, batch_size=7, epochs=0.5)) == 15 // 7


def test_captions_are_drawn_from_all_features(config):
    both = dataclasses.replace(config, captions=("caption", "other"))
    batches = TrainBatches(
        open_source(both, "train"), both, PREPROCESS, TOKENIZER, batch_size=30, seed=0
    )
    words = [text.split()[0] for i in range(12) for text in TOKENIZER.decode(batches[i]["tokens"])]
    assert abs(words.count("other") / len(words) - 0.5) < 0.1  # sigma is 0.026


def test_an_image_looks_different_each_epoch(config):
    iterator = make(config, batch_size=30)
    first, second = next(iterator), next(iterator)
    a, b = np.argsort(numbers(first)), np.argsort(numbers(second))
    different = [
        not np.array_equal(x, y)
        for x, y in zip(first["images"][a], second["images"][b], strict=True)
    ]
    assert all(different)


def test_reading_ahead_hides_the_work(config):
    iterator = make(dataclasses.replace(config, prefetch=2))
    iterator.start_prefetch()
    time.sleep(0.5)
    start = time.perf_counter()
    next(iterator)
    assert time.perf_counter() - start < 0.2
    iterator.close()


def test_eval_batches_are_in_order_complete_and_equal_in_form(config):
    for count, batch_size in [(1, 3), (2, 2), (3, 4)]:
        parts = [
            list(
                eval_batches(
                    config,
                    PREPROCESS,
                    TOKENIZER,
                    batch_size=batch_size,
                    process_index=k,
                    process_count=count,
                )
            )
            for k in range(count)
        ]
        assert len({len(part) for part in parts}) == 1
        rows = [batch for group in zip(*parts, strict=True) for batch in group]
        ids = np.concatenate([batch["ids"] for batch in rows])
        mask = np.concatenate([batch["mask"] for batch in rows])
        assert ids[mask].tolist() == list(range(7))
        assert (ids[~mask] == -1).all()
        captions = [c for batch in rows for c in batch["captions"]]
        assert [c for c, m in zip(captions, mask, strict=True) if m] == [
            f"picture {i}" for i in range(30, 37)
        ]
        source = open_source(config, "test")
        for batch in rows:
            assert batch["images"].shape == (batch_size, 8, 8, 3)
            np.testing.assert_array_equal(batch["tokens"], TOKENIZER(batch["captions"]))
            for image, i, m in zip(batch["images"], batch["ids"], batch["mask"], strict=True):
                expected = PREPROCESS.pixels(source[int(i)]["image"]) if m else 0
                np.testing.assert_array_equal(image, np.broadcast_to(expected, image.shape))


def test_eval_of_another_split(config):
    batch = next(iter(eval_batches(config, PREPROCESS, TOKENIZER, batch_size=2, split="train")))
    assert batch["captions"] == ["picture 0", "picture 1"]


def test_count_examples(config):
    assert (count_examples(config), count_examples(config, "test")) == (30, 7)


def test_images_under_transparency_follow_the_models_background(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "captions.csv").write_text("image,caption\na.png,clear\n")
    preprocess = Preprocess(PreprocessConfig(image_size=4, background=(9, 8, 7)))
    for cache in (False, True):
        config = DataConfig(str(tmp_path), prefetch=0, cache=cache)
        batch = next(train_batches(config, preprocess, TOKENIZER, batch_size=1, seed=0))
        assert batch["images"][0, 0, 0].tolist() == [9, 8, 7]


def test_a_bad_image_is_named_also_from_a_thread(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"")
    (tmp_path / "captions.csv").write_text("image,caption\nbad.png,a\n")
    for prefetch in (0, 2):
        config = DataConfig(str(tmp_path), prefetch=prefetch, eval_split="train")
        with pytest.raises(DataError, match=r"bad\.png is empty"):
            next(train_batches(config, PREPROCESS, TOKENIZER, batch_size=1, seed=0))
    with pytest.raises(DataError, match=r"bad\.png is empty"):
        next(eval_batches(config, PREPROCESS, TOKENIZER, batch_size=1))


def test_what_cannot_be(config):
    with pytest.raises(DataError, match=r"global batch of 32 is larger than the 30 examples"):
        make(config, batch_size=16, process_count=2)
    with pytest.raises(ConfigError, match="batch_size 0"):
        make(config, batch_size=0)
    with pytest.raises(ConfigError, match="process 2 of 2"):
        make(config, process_index=2, process_count=2)
    with pytest.raises(ConfigError, match="process -1 of 1"):
        next(eval_batches(config, PREPROCESS, TOKENIZER, batch_size=1, process_index=-1))
    with pytest.raises(ConfigError, match="batch_size 0"):
        next(eval_batches(config, PREPROCESS, TOKENIZER, batch_size=0))
    with pytest.raises(ConfigError, match=r"cache.*workers 2"):
        make(dataclasses.replace(config, cache=True, workers=2))
    blind = dataclasses.replace(config, eval_split=None)
    with pytest.raises(DataError, match="eval_split is not set"):
        next(eval_batches(blind, PREPROCESS, TOKENIZER, batch_size=1))


def test_openmoji_from_end_to_end(openmoji_dir):
    config = DataConfig(
        source="openmoji",
        data_dir=openmoji_dir,
        cache=True,
        augment=AugmentConfig(crop=(0.75, 1.0), jitter=0.1),
    )
    tokenizer = train_bpe(["woman running: medium skin tone"], 300, 48)
    preprocess = Preprocess(PreprocessConfig(image_size=64))
    with_white = next(train_batches(config, preprocess, tokenizer, batch_size=32, seed=0))
    assert with_white["images"].shape == (32, 64, 64, 3)
    source = open_source(config, "train")
    known = {captions_of(source[i], config)[0] for i in range(len(source))}
    assert set(tokenizer.decode(with_white["tokens"])) <= known
    normal = jax.jit(preprocess.normalize)(with_white["images"])
    assert -1.001 <= float(normal.min()) < float(normal.max()) <= 1.001
