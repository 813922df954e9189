"""Dynamic batching: a queue of items from many threads, and one thread that computes."""

import bisect
import functools
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

MIN_SPEEDUP = 1.05  # per-item speedup at which a smaller batch is preferred to a larger one
RECENT = 0.2  # weight of the last batch in the moving average of the time per item

Key = Hashable
Observe = Callable[[Key, int, float], None]  # key, number of items, seconds


class Waiting(NamedTuple):
    """A queued item, the future of its result, and its place in time."""

    item: Any
    future: Future
    since: float


def arrival(rank: int = 0, seconds: float = 0.0) -> float:
    """Return the place in time of an item that arrives now, for `Batcher.submit`.

    The n-th item of a request waits as if it had arrived when those before it were computed. So a
    request of one item does not wait for all of a large one.

    Args:
        rank: of the item in its request, from 0.
        seconds: that one item takes.
    """
    return time.monotonic() + rank * seconds


class Batcher:
    """Run submitted items in batches with a common key, on one thread of its own.

    The batch with the earliest item runs first. The thread never waits for a batch to fill
    up: the next batch collects while the current one is computed.

    Args:
        compute: function of a key and a list of items that returns a result for each item, or the
            exception of an item that failed.
        sizes: batch sizes that `compute` is compiled for, ascending; other sizes are padded.
        observe: callback for every batch.
        name: of the thread.
    """

    def __init__(
        self,
        compute: Callable[[Any, list[Any]], Sequence[Any]],
        sizes: Sequence[int],
        observe: Observe | None = None,
        name: str = "vlm-device",
    ):
        self._compute, self._sizes = compute, tuple(sizes)
        self._observe = observe or (lambda key, count, seconds: None)
        self._queues: dict[Key, list[Waiting]] = {}  # by key, the earliest item first
        self._lock = threading.Lock()
        self._open, self._draining = True, False
        self._seconds: dict[tuple[Key, int], float] = {}  # of `warm_up`
        self._recent: dict[Key, float] = {}  # seconds per item, of keys that were warmed up
        self._worker = ThreadPoolExecutor(1, name)

    # -------------------------------------------------------------------- called by any thread

    def submit(
        self, key: Key, item: Any, future: Future | None = None, since: float | None = None
    ) -> Future:
        """Queue an item and return the future of its result.

        Args:
            since: place in time, of `arrival`; by default now, and 0 is ahead of all others.
        """
        future = Future() if future is None else future
        entry = Waiting(item, future, arrival() if since is None else since)
        with self._lock:
            if not self._open:
                raise RuntimeError("the server is shutting down")
            bisect.insort(self._queues.setdefault(key, []), entry, key=lambda entry: entry.since)
            if not self._draining:
                self._worker.submit(self._drain)
                self._draining = True
        return future

    def call(self, function: Callable[[], Any]) -> Future:
        """Call a function on that thread, once no item is queued."""
        return self._worker.submit(function)

    def warm_up(self, key: Key, item: Any, most: int | None = None) -> None:
        """Compile every batch size up to `most` for `key`, and measure its time.

        The time is the best of two calls after the compiling one.
        """

        def measure(size: int) -> float:
            times = []
            for _ in range(3):
                start = time.perf_counter()
                self._compute(key, [item] * size)
                times.append(time.perf_counter() - start)
            return min(times[1:])

        sizes = [size for size in self._sizes if most is None or size <= most]
        for size in sizes:  # one by one, so that Ctrl-C waits for one compilation at most
            self._seconds[key, size] = self.call(functools.partial(measure, size)).result()
        self._recent[key] = min(self._seconds[key, size] / size for size in sizes)

    def depths(self) -> dict[Key, int]:
        """Return the queue length of each key."""
        with self._lock:
            return {key: len(queue) for key, queue in self._queues.items()}

    def seconds_per_item(self, key: Key) -> float:
        """Return the recent time per item, a moving average over batches; 0 before `warm_up`."""
        return self._recent.get(key, 0.0)

    def close(self) -> None:
        """Stop accepting items, compute the queued ones, and stop the thread."""
        with self._lock:
            self._open = False
        self._worker.shutdown()

    # ------------------------------------------------------------------------- thread that computes

    def _drain(self) -> None:
        """Run batches until no item is queued, each time the one with the earliest item."""
        while True:
            with self._lock:
                if not self._queues:
                    self._draining = False
                    return
                key = min(self._queues, key=lambda key: self._queues[key][0].since)
                queue = self._queues[key]
                count = self._batch_size(key, len(queue))
                batch, queue[:count] = queue[:count], []
                if not queue:
                    del self._queues[key]
            self._run(key, batch)

    def _batch_size(self, key: Key, count: int) -> int:
        """Return how many of `count` items to take, for the highest measured throughput.

        On a CPU, padding costs as much as items do. On an accelerator, a padded batch often takes
        no longer than the next smaller size.
        """
        below = [size for size in self._sizes if size <= count]
        above = [size for size in self._sizes if size > count][:1]
        best, best_rate = min(count, max(below, default=count)), 0.0
        for size in reversed(below + above):
            if (seconds := self._seconds.get((key, size))) is None:
                continue
            taken = min(size, count)
            if taken / seconds > best_rate * MIN_SPEEDUP:
                best, best_rate = taken, taken / seconds
        return best

    def _run(self, key: Key, batch: Iterable[Waiting]) -> None:
        """Compute a batch. If it fails, compute its items one by one, to isolate the faulty one."""
        pending = [w for w in batch if w.future.set_running_or_notify_cancel()]
        if not pending:
            return
        start = time.perf_counter()
        try:
            results = self._compute(key, [w.item for w in pending])
        except Exception as error:
            if len(pending) == 1:
                pending[0].future.set_exception(error)
                return
            for entry in pending:
                try:
                    result = self._compute(key, [entry.item])[0]
                except Exception as item_error:
                    result = item_error
                _finish(entry.future, result)
            return
        seconds = time.perf_counter() - start
        self._observe(key, len(pending), seconds)
        if key in self._recent:  # a busy machine becomes slower than it was at the start
            self._recent[key] += RECENT * (seconds / len(pending) - self._recent[key])
        for entry, result in zip(pending, results, strict=True):
            _finish(entry.future, result)


def _finish(future: Future, result: Any) -> None:
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
