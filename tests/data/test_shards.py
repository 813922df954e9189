"""Shards in lanes: every sample once in an epoch, blocks that are read again and no more."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.config import DataConfig
from vlm.data.faults import BadSample
from vlm.data.interleave import count_lanes
from vlm.data.shards import Record, Shards
from vlm.data.storage import expand
from vlm.errors import ConfigError, DataError


class Counted:
    """Shards that are named by their length and hold (shard, number); reads are counted."""

    kind, images, faults = "counted", True, ()

    def __init__(self):
        self.read_of = []

    def read(self, shard, offset, number, chunk, part=0, parts=1):
        length = int(shard.split("-")[1])
        first, end = (-(-length * p // parts) for p in (part, part + 1))
        for i in range(max(first, offset), end):
            self.read_of.append((shard, i))
            yield Record({"what": (shard, i)}, i + 1)


def shards(lengths, lanes, *, seed=0, shuffle=64, parts=1):
    names = [f"{i}-{length}" for i, length in enumerate(lengths)]
    config = DataConfig("somewhere", shuffle=shuffle)
    length = max(lengths)
    return Shards(
        names, Counted(), config, seed=seed, lanes=lanes, chunk=1, shard_length=length, parts=parts,
        whole=parts > 1,
    )  # fmt: skip


@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 2**63),
)
@settings(max_examples=40, deadline=None)
def test_an_epoch_of_all_lanes_is_every_sample_once(lengths, lanes, parts, seed):
    lanes = min(lanes, len(lengths) * parts)
    made = shards(lengths, lanes, seed=seed, parts=parts)
    units = len(lengths) * parts
    expected = sorted((name, i) for name in made.names for i in range(int(name.split("-")[1])))
    taken = {0: [], 1: []}
    for lane in range(lanes):
        with ThreadPoolExecutor(1) as pool:
            reader = made.lane(lane, None, pool)
            while (sample := next(reader)).position >> 24 < 2 * units:
                taken[(sample.position >> 24) // units].append(sample)
            reader.close()
    for samples in taken.values():
        assert sorted(sample.example["what"] for sample in samples) == expected
        assert len({sample.position for sample in samples}) == len(samples)


def test_no_lane_starts_an_epoch_before_all_parts_of_the_last_one_are_assigned():
    made = shards([5] * 7, 3, parts=2)
    turns = [made.part_of(lane, turn) for turn in range(10) for lane in range(3)]
    assert [epoch for epoch, _ in turns] == sorted(epoch for epoch, _ in turns)
    assert sorted(part for epoch, part in turns if epoch == 0) == list(range(14))


@given(
    st.lists(st.integers(1, 9), min_size=3, max_size=9),
    st.integers(0, 60),
    st.integers(1, 9),
    st.integers(1, 4),
)
@settings(max_examples=40, deadline=None)
def test_a_lane_goes_on_from_any_position_and_reads_its_block_again_at_most(
    lengths, taken, block, parts
):
    with ThreadPoolExecutor(1) as pool:
        made = shards(lengths, 3, shuffle=3 * block, parts=parts)
        whole = made.lane(1, None, pool)
        for _ in range(taken):
            next(whole)
        position = whole.position()
        assert all(isinstance(number, int) for number in position)
        assert len(position) == 4
        made.form.read_of = []
        resumed = made.lane(1, position, pool)
        assert [next(resumed) for _ in range(25)] == [next(whole) for _ in range(25)]
        assert position[-1] <= made.block
        whole.close()
        resumed.close()


def test_a_block_is_whole_parts_and_no_part_is_read_twice():
    made = shards([40] * 6, 2, shuffle=40, parts=4)
    with ThreadPoolExecutor(1) as pool:
        lane = made.lane(0, None, pool)
        taken = [next(lane).position >> 24 for _ in range(120)]
        lane.close()
    blocks = [set(taken[first : first + 20]) for first in range(0, 120, 20)]
    assert [len(block) for block in blocks] == [2] * 6
    assert len(set(made.form.read_of)) == len(made.form.read_of)


def test_blocks_are_shuffled_and_epochs_too():
    with ThreadPoolExecutor(1) as pool:
        lane = shards([40] * 6, 2, shuffle=40).lane(0, None, pool)
        first = [next(lane).example["what"] for _ in range(120)]
        second = [next(lane).example["what"] for _ in range(120)]
        lane.close()
    assert first[:20] != sorted(first[:20])
    assert {name for name, _ in first} != {name for name, _ in second} or first != second


def test_closing_does_not_wait_for_a_long_read():
    release, started = threading.Event(), threading.Event()

    class Slow(Counted):
        def read(self, *args):
            for record in super().read(*args):
                started.set()
                release.wait(5)
                yield record

    made = shards([10_000], 1, shuffle=100_000)
    made.form = Slow()
    with ThreadPoolExecutor(1) as pool:
        lane = made.lane(0, None, pool)
        started.wait(5)
        release.set()
        lane.close()
    assert len(made.form.read_of) < 10_000


def test_a_shard_without_examples_is_a_fault_and_no_hang():
    with ThreadPoolExecutor(1) as pool:
        lane = shards([0, 0], 1).lane(0, None, pool)
        faults = [next(lane).example for _ in range(5)]
        lane.close()
    assert {fault.kind for fault in faults if isinstance(fault, BadSample)} == {"empty shard"}


def test_two_hundred_thousand_shards_begin_at_once():
    with ThreadPoolExecutor(4) as pool:
        made = shards([10_000] * 200_000, 256, shuffle=8192)
        lanes = [made.lane(number, None, pool) for number in (0, 100, 255)]
        for lane in lanes:
            next(lane)
        far = [1_281, 9_000, 9_000, 17]  # in the second epoch
        resumed = made.lane(7, far, pool)
        next(resumed)
        for lane in [*lanes, resumed]:
            lane.close()
    assert len(made.form.read_of) <= 4 * 2 * made.block + 4


def test_the_number_of_interleaved_readers_is_given_or_chosen():
    config = DataConfig(interleave=None)
    assert count_lanes(config, 32_768, 231_350, 64) == 256
    assert count_lanes(config, 96, 10, 1) == 8
    assert count_lanes(dataclasses.replace(config, interleave=1024), 32_768, 231_350, 64) == 1024
    with pytest.raises(ConfigError, match=r"data.interleave 3 does not divide the batch of 8"):
        count_lanes(dataclasses.replace(config, interleave=3), 8, 10, 1)
    with pytest.raises(ConfigError, match=r"2 lanes cannot be shared evenly by 4 processes"):
        count_lanes(config, 32, 3, 4)
    with pytest.raises(DataError, match="2 shards, too few for 3 lanes"):
        shards([5, 5], 3)


def test_names_stand_for_many_files(tmp_path):
    for name in ("a-0.tar", "a-1.tar", "b-0.tar"):
        (tmp_path / name).write_bytes(b"")
    names = expand("gs://bucket/{0..1}/x-{08..11}.tar")
    assert names[:2] == ["gs://bucket/0/x-08.tar", "gs://bucket/0/x-09.tar"]
    assert len(names) == 8
    assert expand("{a,b}-{0..1}.tar") == ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]
    assert expand(f"{tmp_path}/a-*.tar::{tmp_path}/b-0.tar") == [
        str(tmp_path / name) for name in ("a-0.tar", "a-1.tar", "b-0.tar")
    ]
    for pattern in (f"{tmp_path}/c-*.tar", ""):
        with pytest.raises(DataError, match="there are no shards"):
            expand(pattern)
