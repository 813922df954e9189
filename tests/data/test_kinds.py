"""Every kind of source: the same batches for any workers and processes, resumed anywhere."""

import dataclasses
import itertools
import json
import pickle

import kinds
import numpy as np
import pytest
from kinds import KINDS, PREPROCESS, TOKENIZER, numbers_of

from vlm.config import DataConfig, FieldFilter
from vlm.data import sidecar
from vlm.data.faults import BadSample
from vlm.data.interleave import LaneBatches
from vlm.data.pipeline import TrainIterator, train_batches
from vlm.data.shard_index import open_split
from vlm.errors import ConfigError

STEPS, BATCH = 26, 8


@pytest.fixture(scope="module", params=KINDS)
def config(request, tmp_path_factory):
    return kinds.make(request.param, tmp_path_factory.mktemp("kind") / "data")


@pytest.fixture(scope="module")
def whole(config):
    """The batches of one uninterrupted run, and the state before each."""
    iterator = make(config)
    states, batches = [], []
    for _ in range(STEPS):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    iterator.close()
    return batches, states


def make(config, index: int = 0, count: int = 1) -> TrainIterator:
    return train_batches(
        config,
        PREPROCESS,
        TOKENIZER,
        batch_size=BATCH // count,
        seed=3,
        process_index=index,
        process_count=count,
    )


class InThisProcess:
    """What grain makes of a stream's batches in several workers, without starting processes."""

    def __init__(self, order: LaneBatches, workers: int):
        self._parts, order.parts = [], workers
        for worker in range(workers):
            part = order.read()
            part = part._parent if hasattr(part, "_parent") else part
            copy = type(part).__new__(type(part))
            copy.__dict__ |= part.__dict__
            copy.set_slice(slice(worker, None, workers))
            self._parts.append(iter(copy))
        self._turns = itertools.cycle(self._parts)

    def __next__(self):
        return next(next(self._turns))

    def close(self):
        for part in self._parts:
            part.close()


def resume(config, state: str, workers: int, index: int = 0, count: int = 1) -> TrainIterator:
    iterator = make(config, index, count)
    iterator.set_state(json.loads(state))
    if isinstance(iterator._order, LaneBatches):
        workers = min(workers, len(iterator._order.lanes))
        iterator._reader = InThisProcess(iterator._order, workers)
    return iterator


def assert_same(batch, expected):
    for name in ("images", "tokens"):
        np.testing.assert_array_equal(batch[name], expected[name], err_msg=name)


def test_resumes_with_other_workers_go_on_exactly(config, whole):
    batches, states = whole
    rng = np.random.default_rng(1)
    for number, start in enumerate(rng.integers(0, STEPS - 2, 8).tolist()):
        iterator = resume(config, states[start], workers=1 + number % 4)
        for batch in batches[start : start + 2]:
            assert_same(next(iterator), batch)
        assert json.loads(json.dumps(iterator.get_state())) == json.loads(states[start + 2])
        iterator.close()


@pytest.mark.parametrize("count", [2, 4])
def test_processes_make_the_same_global_batches(config, whole, count):
    batches, _ = whole
    parts = [make(config, index, count) for index in range(count)]
    for expected in batches[:6]:
        rows = [next(part) for part in parts]
        joined = {k: np.concatenate([row[k] for row in rows]) for k in ("images", "tokens")}
        assert_same(joined, expected)
    state = {**parts[0].get_state()}
    if "lanes" in state:  # as a checkpoint of all processes has them
        state["lanes"] = {k: v for part in parts for k, v in part.get_state()["lanes"].items()}
    alone = resume(config, json.dumps(state), workers=3)
    assert_same(next(alone), batches[6])
    for part in [*parts, alone]:
        part.close()


def test_every_sample_comes_once_in_an_epoch(config, whole):
    seen = [number for batch in whole[0] for number in numbers_of(batch)]
    if config.mixture:
        return
    expected = (
        {n for n in range(kinds.COUNT) if n % 2} if config.filters else set(range(kinds.COUNT))
    )
    assert set(seen) == expected
    if config.interleave is None:
        assert sorted(seen[: kinds.COUNT]) == sorted(expected)


def first_of(config):
    iterator = make(config)
    batch = next(iterator)
    iterator.close()
    return batch


def test_a_mixture_by_epochs_is_one_by_the_weights_that_they_come_to(tmp_path):
    config = kinds.make("mixture", tmp_path / "data")  # weights of 2 and 1
    streamed, table = (dataclasses.replace(part, weight=None) for part in config.mixture)
    streamed = dataclasses.replace(streamed, epochs=4, examples=kinds.COUNT)
    table = dataclasses.replace(table, epochs=2)  # its length is known
    expected = first_of(config)
    assert_same(first_of(dataclasses.replace(config, mixture=(streamed, table))), expected)
    for wrong, message in (
        ({"examples": None}, "set examples=N"),
        ({"epochs": None}, "has no epochs beside parts with epochs"),
        ({"weight": 1.0}, "has a weight beside parts with epochs"),
    ):
        parts = (dataclasses.replace(streamed, **wrong), table)
        with pytest.raises(ConfigError, match=message):
            make(dataclasses.replace(config, mixture=parts))


def test_indexed_shards_find_their_texts_in_the_tables_beside_them(tmp_path):
    sources = []
    for name, write in (("within", kinds.tars), ("beside", kinds.tars_beside_tables)):
        (tmp_path / name).mkdir()
        sources.append(DataConfig(write(tmp_path / name), eval_split=None, prefetch=0))
    within, beside = map(first_of, sources)
    assert_same(beside, within)


def test_a_table_beside_a_shard_is_read_once_and_its_absence_is_named(tmp_path, monkeypatch):
    source = kinds.tars_beside_tables(tmp_path)
    (tmp_path / "001.parquet").unlink()
    config = DataConfig(source, filters=(FieldFilter("language", one_of=("en",)),), eval_split=None)
    opened = open_split(config, "train")
    monkeypatch.setattr(sidecar, "read_columns", None)  # no table is read again
    opened = pickle.loads(pickle.dumps(opened))  # as a worker has it
    lost = np.array_split(np.arange(kinds.COUNT), kinds.SHARDS)[1].tolist()
    for index in reversed(range(len(opened))):
        if index in lost:
            with pytest.raises(BadSample, match=r"001\.parquet") as bad:
                opened[index]
            assert (bad.value.kind, bad.value.where) == ("failed read", opened.shard_name(index))
        else:
            language = "en" if index % 2 else "de"
            assert (
                opened[index].items()
                >= {
                    "caption": f"picture {index}",
                    "language": language,
                }.items()
            )


def test_the_order_is_shuffled_and_another_in_each_epoch(config, whole):
    seen = [number for batch in whole[0] for number in numbers_of(batch)]
    ups = np.mean(np.diff(seen) == 1)
    assert ups < 0.3
    assert seen[:16] != seen[len(seen) // 2 :][:16]


@pytest.mark.slow
def test_real_workers_change_nothing(tmp_path):
    config = kinds.make("mixture", tmp_path / "data")
    expected = list(itertools.islice(make(config), 5))
    iterator = make(dataclasses.replace(config, workers=2, prefetch=1))
    for batch in expected[:3]:
        assert_same(next(iterator), batch)
    state = iterator.get_state()
    iterator.close()
    resumed = make(dataclasses.replace(config, prefetch=2))
    resumed.set_state(state)
    for batch in expected[3:]:
        assert_same(next(resumed), batch)
    resumed.close()


@pytest.mark.parametrize("sizes", [(12, 6, 12), (6, 12, 6)])
@pytest.mark.parametrize("interleave", [6, None])
@pytest.mark.parametrize("kind", ["tar, streamed", "parquet of bytes"])
def test_the_batch_size_of_a_stream_may_change_at_a_resume(tmp_path, kind, interleave, sizes):
    """The readers stay those of the checkpoint, so that no example comes twice in the pass.

    A batch smaller than the number of readers starts a new pass.
    """
    config = dataclasses.replace(
        kinds.make(kind, tmp_path / "data"), interleave=interleave, shuffle=None
    )
    seen, state = [], None
    for batch_size in sizes:
        batches = train_batches(config, PREPROCESS, TOKENIZER, batch_size=batch_size, seed=0)
        if state is not None:
            too_small = len(state["lanes"]) > batch_size
            batches.resume(state)
            start = "starts a new pass" if too_small else "continues"
            assert batches.position_change.startswith(f"{start} at step ")
            if too_small:
                assert interleave is None
                batches.close()
                return
        assert batches.samples == len(seen)
        seen += numbers_of(next(batches))
        state = json.loads(json.dumps(batches.get_state()))
        batches.close()
    assert len(seen) == len(set(seen)) == sum(sizes)
