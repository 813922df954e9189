"""Dynamic batching: a queue of items from many threads, and one device thread."""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from vlm.errors import DataError

MIN_SPEEDUP = 1.05  # per-item speedup at which a smaller batch is preferred to a larger one

Key = Hashable
Observe = Callable[[Key, int, float], None]  # key, number of items, seconds


class Waiting(NamedTuple):
    """A queued item, the future of its row, and its arrival time."""

    item: Any
    future: Future
    since: float


class Batcher:
    """Run submitted items in batches with a common key, on one device thread.

    The batch with the longest-waiting item runs first. The device thread never waits for a batch to
    fill up: the next batch collects while the current one is computed.

    Args:
        compute: function of a key and a list of items that returns a row for each item.
        sizes: batch sizes that `compute` is compiled for, ascending; other sizes are padded.
        observe: callback for every batch.
    """

    def __init__(
        self,
        compute: Callable[[Any, list[Any]], np.ndarray],
        sizes: Sequence[int],
        observe: Observe | None = None,
    ):
        self._compute, self._sizes = compute, tuple(sizes)
        self._observe = observe or (lambda key, count, seconds: None)
        self._queues: dict[Key, deque[Waiting]] = {}
        self._jobs: deque[tuple[Callable[[], Any], Future]] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._seconds: dict[tuple[Key, int], float] = {}
        self._thread = threading.Thread(target=self._work, name="vlm-device", daemon=True)
        self._thread.start()

    # -------------------------------------------------------------------- called by any thread

    def submit(
        self, key: Key, item: Any, future: Future | None = None, *, first: bool = False
    ) -> Future:
        """Queue one item and return the future of its row; `first` puts it ahead of the queue."""
        future = Future() if future is None else future
        with self._changed:
            if not self._open:
                raise RuntimeError("the server is shutting down")
            queue = self._queues.setdefault(key, deque())
            since = 0.0 if first else time.monotonic()
            (queue.appendleft if first else queue.append)(Waiting(item, future, since))
            self._changed.notify()
        return future

    def call(self, function: Callable[[], Any]) -> Future:
        """Call a function on the device thread, between two batches."""
        future: Future = Future()
        with self._changed:
            if not self._open:
                raise RuntimeError("the server is shutting down")
            self._jobs.append((function, future))
            self._changed.notify()
        return future

    def warm_up(self, key: Key, item: Any) -> None:
        """Compile every batch size for `key`, and measure its time.

        The time is the best of two calls after the compiling one.
        """

        def run() -> None:
            for size in self._sizes:
                times = []
                for _ in range(3):
                    start = time.perf_counter()
                    self._compute(key, [item] * size)
                    times.append(time.perf_counter() - start)
                self._seconds[key, size] = min(times[1:])

        self.call(run).result()

    def depths(self) -> dict[Key, int]:
        """Return the queue length of each key."""
        with self._changed:
            return {key: len(queue) for key, queue in self._queues.items()}

    def seconds_per_item(self, key: Key) -> float:
        """Return the time per item at the best batch size; 0 before `warm_up`."""
        times = [t / size for (other, size), t in self._seconds.items() if other == key]
        return min(times, default=0.0)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop accepting items, compute the queued ones, and stop the thread."""
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join()

    # -------------------------------------------------------------------------- device thread

    def _work(self) -> None:
        while (task := self._next()) is not None:
            task()

    def _next(self) -> Callable[[], None] | None:
        """Wait for the next task and return it, or None once closed and empty."""
        with self._changed:
            while True:
                if self._jobs:
                    function, future = self._jobs.popleft()
                    return lambda: settle(future, function)
                waiting = [(queue[0].since, key) for key, queue in self._queues.items() if queue]
                if waiting:
                    key = min(waiting, key=lambda pair: pair[0])[1]
                    queue = self._queues[key]
                    batch = [queue.popleft() for _ in range(self._batch_size(key, len(queue)))]
                    return lambda: self._run(key, batch)
                if not self._open:
                    return None
                self._changed.wait()

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
            rows = self._compute(key, [w.item for w in pending])
        except Exception as error:
            if len(pending) == 1:
                pending[0].future.set_exception(error)
                return
            for entry in pending:
                try:
                    row = self._compute(key, [entry.item])[0]
                except Exception as item_error:
                    entry.future.set_exception(item_error)
                else:
                    _set_row(entry.future, row)
            return
        self._observe(key, len(pending), time.perf_counter() - start)
        for entry, row in zip(pending, rows, strict=True):
            _set_row(entry.future, row)


def settle(future: Future, function: Callable[[], Any]) -> None:
    """Set a future to the result or the error of `function`, unless it was cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except BaseException as error:
        future.set_exception(error)
        if not isinstance(error, Exception):
            raise
    else:
        future.set_result(result)


def _set_row(future: Future, row: np.ndarray) -> None:
    if np.isfinite(row).all():
        future.set_result(row)
    else:
        future.set_exception(
            DataError("its embedding is not finite; the model's weights may be corrupt")
        )
