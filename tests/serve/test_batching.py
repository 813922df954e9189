"""The queue and its thread: what runs together, in which order, and what becomes of errors."""

import threading
import time

import numpy as np
import pytest

from vlm.errors import DataError
from vlm.serve.batching import Batcher


class Device:
    """Doubles numbers, in batches that it notes; -1 is an item that fails, -2 gives no number."""

    def __init__(self, sizes=(1, 2, 4, 8)):
        self.ran = []
        self.batcher = Batcher(self.compute, sizes)

    def compute(self, key, items):
        self.ran.append((key, list(items)))
        if -1 in items:
            raise DataError("minus one")
        return np.array([[np.nan if item == -2 else 2.0 * item] for item in items])

    def hold(self):
        """Keep the thread busy until what this gives is set."""
        release, held = threading.Event(), threading.Event()
        self.batcher.call(lambda: (held.set(), release.wait()))
        held.wait()
        return release


@pytest.fixture
def device():
    device = Device()
    yield device
    device.batcher.close()


def test_what_waits_runs_together_in_powers_of_two_and_the_oldest_kind_first(device):
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


def test_an_item_that_fails_does_not_fail_the_others(device):
    release = device.hold()
    answers = [device.batcher.submit("a", item) for item in (3, -1, 4, -2)]
    release.set()
    assert [answers[0].result(5)[0], answers[2].result(5)[0]] == [6.0, 8.0]
    with pytest.raises(DataError, match="minus one"):
        answers[1].result(5)
    with pytest.raises(DataError, match="not finite"):
        answers[3].result(5)


def test_whoever_comes_first_and_whoever_has_left(device):
    release = device.hold()
    late, left = device.batcher.submit("a", 1), device.batcher.submit("a", 5)
    first = device.batcher.submit("b", 2, first=True)
    left.cancel()
    assert device.batcher.depths() == {"a": 2, "b": 1}
    release.set()
    assert [first.result(5)[0], late.result(5)[0]] == [4.0, 2.0]
    assert device.ran == [("b", [2]), ("a", [1])]


def test_sizes_are_chosen_by_what_they_were_measured_to_take():
    seconds = {1: 0.01, 2: 0.011, 4: 0.012, 8: 0.5}

    def compute(key, items):
        time.sleep(seconds[len(items)])
        return np.zeros((len(items), 1))

    batcher = Batcher(compute, (1, 2, 4, 8))
    batcher.warm_up("a", 0)
    # As an accelerator: three fit into a padded four; and eight at once are slow.
    assert [batcher._batch_size("a", n) for n in (1, 3, 4, 6, 8)] == [1, 3, 4, 4, 4]
    assert 0.002 < batcher.seconds_per_item("a") < 0.006
    batcher.close()
    # As a CPU: padding costs what items do.
    seconds |= {n: 0.01 * n for n in seconds}
    batcher = Batcher(compute, (1, 2, 4, 8))
    batcher.warm_up("a", 0)
    assert [batcher._batch_size("a", n) for n in (1, 3, 6, 8)] == [1, 2, 4, 8]
    batcher.close()


def test_closing_computes_what_waits_and_takes_nothing_more(device):
    release = device.hold()
    answers = [device.batcher.submit("a", i) for i in range(5)]
    threading.Timer(0.05, release.set).start()
    device.batcher.close()
    assert [answer.result(0)[0] for answer in answers] == [0, 2, 4, 6, 8]
    with pytest.raises(RuntimeError):
        device.batcher.submit("a", 1)


def test_many_threads_get_their_own_rows():
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
