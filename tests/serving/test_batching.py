"""Dynamic batching: batch composition, order, and isolation of errors."""

import contextlib
import json
import pathlib
import shutil
import threading
import time

import numpy as np
import pytest

import vlm
from vlm.errors import DataError
from vlm.serving.batched import Batched
from vlm.serving.batching import Batcher, arrival
from vlm.serving.ordered_threads import OrderedThreads

NOMIC = pathlib.Path(__file__).parents[1] / "weights" / "golden" / "st_nomic"


class Device:
    """Fake device that doubles numbers and records batches; -1 raises, -2 is an error alone."""

    def __init__(self, sizes=(1, 2, 4, 8)):
        self.ran = []
        self.batcher = Batcher(self.compute, sizes)

    def compute(self, key, items):
        self.ran.append((key, list(items)))
        if -1 in items:
            raise DataError("minus one")
        return [DataError("minus two") if item == -2 else np.array([2.0 * item]) for item in items]

    def hold(self):
        """Block the device thread until the returned event is set."""
        release, held = threading.Event(), threading.Event()
        self.batcher.call(lambda: (held.set(), release.wait()))
        held.wait()
        return release


@pytest.fixture
def device():
    device = Device()
    yield device
    device.batcher.close()


def test_queued_items_run_in_batches_of_powers_of_two_and_the_oldest_key_first(device):
    release = device.hold()
    a = [device.batcher.submit("a", i) for i in range(7)]
    b = [device.batcher.submit("b", i) for i in range(2)]
    release.set()
    assert [answer.result(5).tolist() for answer in a + b] == [
        *([2.0 * i] for i in range(7)), [0.0], [2.0],
    ]  # fmt: skip
    assert [(key, len(items)) for key, items in device.ran] == [
        ("a", 4), ("b", 2), ("a", 2), ("a", 1),
    ] or [(key, len(items)) for key, items in device.ran] == [
        ("a", 4), ("a", 2), ("a", 1), ("b", 2),
    ]  # fmt: skip


def test_a_failing_item_does_not_fail_its_batch(device):
    release = device.hold()
    answers = [device.batcher.submit("a", item) for item in (3, -1, 4, -2)]
    release.set()
    assert [answers[0].result(5)[0], answers[2].result(5)[0]] == [6.0, 8.0]
    with pytest.raises(DataError, match="minus one"):
        answers[1].result(5)
    with pytest.raises(DataError, match="minus two"):
        answers[3].result(5)


def test_priority_and_cancelled_items(device):
    release = device.hold()
    queued, cancelled = device.batcher.submit("a", 1), device.batcher.submit("a", 5)
    first = device.batcher.submit("b", 2, since=0.0)
    cancelled.cancel()
    assert device.batcher.depths() == {"a": 2, "b": 1}
    release.set()
    assert [first.result(5)[0], queued.result(5)[0]] == [4.0, 2.0]
    assert device.ran == [("b", [2]), ("a", [1])]


def test_a_small_request_does_not_wait_for_all_of_a_large_one(device):
    release = device.hold()
    large = [device.batcher.submit("image", i, since=arrival(i, 10)) for i in range(12)]
    small = [device.batcher.submit("text", 50), device.batcher.submit("image", 60)]
    release.set()
    for answer in [*large, *small]:
        answer.result(5)
    assert device.ran[0] == ("image", [0, 60, 1, 2, 3, 4, 5, 6])
    assert device.ran[1] == ("text", [50])


def test_threads_run_the_earliest_call_first():
    threads, release, ran = OrderedThreads(1, "test"), threading.Event(), []
    threads.submit(0.0, release.wait)
    for since in (3.0, 1.0, 2.0):
        threads.submit(since, lambda since=since: ran.append(since))
    release.set()
    threads.close()
    assert ran == [1.0, 2.0, 3.0]
    with pytest.raises(RuntimeError, match="shutting down"):
        threads.submit(0.0, release.wait)


def test_batch_sizes_follow_the_measured_times():
    seconds = {1: 0.01, 2: 0.011, 4: 0.012, 8: 0.5}

    def compute(key, items):
        time.sleep(seconds[len(items)])
        return np.zeros((len(items), 1))

    batcher = Batcher(compute, (1, 2, 4, 8))
    batcher.warm_up("a", 0)
    # Like an accelerator: three fit into a padded four, and a batch of eight is slow.
    assert [batcher._batch_size("a", n) for n in (1, 3, 4, 6, 8)] == [1, 3, 4, 4, 4]
    assert 0.002 < batcher.seconds_per_item("a") < 0.006
    batcher.close()
    # Like a CPU: padding costs as much as items do.
    batcher = Batcher(compute, (1, 2, 4, 8))
    batcher._seconds = {("a", n): 0.01 * n for n in seconds}  # exact, whatever else is running
    assert [batcher._batch_size("a", n) for n in (1, 3, 6, 8)] == [1, 2, 4, 8]
    batcher.close()


def test_long_texts_have_lengths_that_double_and_small_batches(tmp_path, monkeypatch):
    folder = shutil.copytree(NOMIC, tmp_path / "nomic")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"n_positions": 2048}))
    bundle = vlm.load(folder, context_length=2048).with_prompt("clustering")
    with contextlib.closing(Batched(bundle, max_batch=4)) as model:
        lengths = [kind.length for kind in model.kinds()]
        assert lengths[-4:] == [256, 512, 1024, 2048]
        long = "a photo of a cat " * 60
        (needed,) = bundle.tokenizer.lengths(long)
        assert 256 < needed < 512
        observed = []
        monkeypatch.setattr(model.batcher, "_observe", lambda kind, *more: observed.append(kind))
        assert np.abs(model.encode_text(long) - bundle.encode_text(long)).max() < 1e-5
        assert observed == [("text", 512)]
        largest = {}
        monkeypatch.setattr(
            model.batcher, "_compute", lambda kind, items: largest.update({kind.length: len(items)})
        )
        model.warm_up()
        assert [largest[n] for n in lengths[-4:]] == [4, 2, 1, 1]
        seconds = {kind: float(kind.length) for kind in model.kinds()}
        monkeypatch.setattr(model.batcher, "_recent", seconds)
        assert model.seconds_per_item() == model.seconds_per_item("text") == 256


def test_the_time_per_item_follows_a_machine_that_becomes_slower():
    pause = 0.0

    def compute(key, items):
        time.sleep(pause)
        return [0.0] * len(items)

    batcher = Batcher(compute, (1,))
    batcher.warm_up("a", 0)
    before, pause = batcher.seconds_per_item("a"), 0.02
    for _ in range(20):
        batcher.submit("a", 0).result(5)
    assert batcher.seconds_per_item("a") > max(before, 0.015)
    batcher.submit("other", 0).result(5)
    assert batcher.seconds_per_item("other") == 0  # it was not warmed up: no growth by odd keys
    batcher.close()


def test_closing_computes_queued_items_and_accepts_no_more(device):
    release = device.hold()
    answers = [device.batcher.submit("a", i) for i in range(5)]
    threading.Timer(0.05, release.set).start()
    device.batcher.close()
    assert [answer.result(0)[0] for answer in answers] == [0, 2, 4, 6, 8]
    with pytest.raises(RuntimeError):
        device.batcher.submit("a", 1)


def test_each_thread_gets_its_own_rows():
    device = Device()
    wrong = []

    def ask(number):
        for i in range(200):
            if device.batcher.submit(i % 3, number * 1000 + i).result(5)[0] != 2 * (
                number * 1000 + i
            ):
                wrong.append((number, i))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    device.batcher.close()
    assert wrong == []
    assert sum(len(items) for _, items in device.ran) == 1600
    assert max(len(items) for _, items in device.ran) <= 8
