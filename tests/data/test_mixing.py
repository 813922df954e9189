"""Streams over shards that are sorted by class have the classes of random order in a batch."""

import io
import json
import os
import random
import tarfile

import kinds
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from vlm import errors
from vlm.config import DataConfig
from vlm.data.dataset_stats import stream_mixing
from vlm.data.mixing import LEAST, MixingMonitor, expected_distinct, measure
from vlm.data.pipeline import train_batches
from vlm.data.shard_index import beside, write_index
from vlm.data.shard_stream import plan_stream
from vlm.data.storage import expand

CLASSES, EACH, FILES = 200, 15, 6
BATCH, SHUFFLE = 128, 512


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """Files that are sorted by class, in row groups of 100 as older `datasets` wrote them."""
    folder = tmp_path_factory.mktemp("parquet")
    image = kinds.jpeg(0)
    for shard, numbers in enumerate(np.array_split(np.arange(CLASSES * EACH), FILES)):
        rows = [
            {"image": {"bytes": image, "path": None}, "caption": f"picture {n // EACH}"}
            for n in numbers.tolist()
        ]
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, folder / f"{shard}.parquet", row_group_size=100)
    return DataConfig(str(folder / "*.parquet"), eval_split=None, prefetch=0, shuffle=SHUFFLE)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Shards that are sorted by class, without an index."""
    folder = tmp_path_factory.mktemp("tars")
    image = kinds.jpeg(0)
    for shard, numbers in enumerate(np.array_split(np.arange(CLASSES * EACH), FILES)):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for n in numbers.tolist():
                for name, data in (("jpg", image), ("txt", f"picture {n // EACH}".encode())):
                    info = tarfile.TarInfo(f"{n:06d}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return DataConfig(
        str(folder / "*.tar"), eval_split=None, prefetch=0, access="stream", shuffle=SHUFFLE
    )


def iterate(config, batch=BATCH, **options):
    return train_batches(
        config, kinds.PREPROCESS, kinds.TOKENIZER, batch_size=batch, seed=1, **options
    )


def distinct_of(config, batches):
    iterator = iterate(config)
    found = [len(set(kinds.numbers_of(next(iterator)))) for _ in range(batches)]
    iterator.close()
    return np.mean(found)


# A batch of random order has B draws without replacement; with replacement it has slightly fewer
# classes, K (1 - (1 - 1/K)^B).
RANDOM = CLASSES * (1 - (1 - 1 / CLASSES) ** BATCH)


@pytest.mark.slow
def test_sorted_parquet_and_sorted_tars_with_an_index_are_mixed_as_in_random_order(parquet, tars):
    assert distinct_of(parquet, 12) > 0.95 * RANDOM
    assert distinct_of(tars, 12) < 0.5 * RANDOM
    names = expand(tars.source)
    write_index(names, beside(names))
    try:
        assert distinct_of(tars, 12) > 0.95 * RANDOM
    finally:
        os.remove(beside(names))


@pytest.mark.slow
def test_a_run_warns_of_few_classes_with_the_fix(tars, parquet, caplog, monkeypatch):
    monkeypatch.setattr(errors, "WARNED", set())
    iterator = iterate(tars)
    for _ in range(20):
        next(iterator)
    iterator.close()
    (warning,) = [r.message for r in caplog.records if "distinct classes" in r.message]
    assert "run vlm data index" in warning
    caplog.clear()
    iterator = iterate(parquet)
    for _ in range(20):
        next(iterator)
    iterator.close()
    assert not [r.message for r in caplog.records if "distinct classes" in r.message]


@pytest.mark.slow
def test_data_show_measures_the_same_mixing_without_images(parquet, tars):
    found = stream_mixing(parquet, BATCH)
    assert found.distinct == pytest.approx(distinct_of(parquet, 8), rel=0.05)
    assert found.random == pytest.approx(RANDOM, rel=0.02)  # RANDOM is with replacement
    assert stream_mixing(tars, BATCH).share < LEAST


def test_the_plan_depends_on_data_and_batch(parquet):
    names = expand(parquet.source)
    plan = plan_stream(parquet, names, BATCH)
    assert plan.units >= BATCH
    assert plan.most == BATCH
    assert plan.buffer(BATCH) >= BATCH * -(-plan.length // plan.parts)
    small = plan_stream(parquet, names, 8)
    assert small.parts <= plan.parts


@pytest.mark.parametrize("counts", [[3, 1, 1], [50] * 10, [1] * 30, [200, 1, 1, 1]])
def test_random_order_is_that_of_drawn_batches(counts):
    rng = random.Random(0)
    examples = [group for group, count in enumerate(counts) for _ in range(count)]
    batch = min(5, len(examples))
    drawn = [len(set(rng.sample(examples, batch))) for _ in range(4_000)]
    assert expected_distinct(counts, batch) == pytest.approx(np.mean(drawn), abs=0.05)
    assert expected_distinct(counts, len(examples)) == pytest.approx(len(counts))


def test_mixing_relates_batches_to_all_examples():
    sorted_batches = [[0] * 4, [1] * 4, [2] * 4]
    found = measure(sorted_batches)
    assert (found.batch, found.distinct) == (4, 1)
    assert found.random == pytest.approx(expected_distinct([4, 4, 4], 4))
    assert found.share < 0.5
    assert measure([[0, 1, 2, 3]] * 3, dict.fromkeys(range(4), 100)).share > 1


def test_a_monitor_warns_of_sorted_batches_once_and_never_of_random_ones():
    rng = np.random.default_rng(0)
    monitor = MixingMonitor()
    assert all(monitor.add(rng.integers(0, 50, 64)) is None for _ in range(300))
    monitor = MixingMonitor()
    found = [monitor.add(np.repeat(np.arange(step, step + 4), 16)) for step in range(300)]
    (result,) = [one for one in found if one is not None]
    assert result.distinct == 4
    assert json.dumps(result._asdict())
