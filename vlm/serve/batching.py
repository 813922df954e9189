"""Many threads, one device: items wait in a queue and are computed in batches by one thread."""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from vlm.errors import DataError

CLEARLY = 1.05  # how much faster per item a smaller batch must be than a larger one to be preferred

Key = Hashable
Observe = Callable[[Key, int, float], None]  # what ran, how many items, and the seconds it took


class Waiting(NamedTuple):
    """An item that waits, where its row goes, and when it came."""

    item: Any
    answer: Future
    since: float


class Batcher:
    """Runs what is submitted, from any thread, in batches of one key each, on a thread of its own.

    The batch with the longest-waiting item goes first. Its size is one of `sizes`: nothing is
    waited for, since while one batch is computed the next one gathers.

    Args:
        compute: from a key and a list of items to one row for each.
        sizes: that `compute` is compiled for, ascending; a batch between two of them is padded.
        observe: told of every batch.
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

    # ------------------------------------------------------------------------ for the callers

    def submit(
        self, key: Key, item: Any, answer: Future | None = None, *, first: bool = False
    ) -> Future:
        """Queue one item and return the future of its row; `first` puts it before all others."""
        answer = Future() if answer is None else answer
        with self._changed:
            if not self._open:
                raise RuntimeError("the server is shutting down")
            queue = self._queues.setdefault(key, deque())
            since = 0.0 if first else time.monotonic()
            (queue.appendleft if first else queue.append)(Waiting(item, answer, since))
            self._changed.notify()
        return answer

    def call(self, function: Callable[[], Any]) -> Future:
        """Let the thread of the device call a function between two batches."""
        answer: Future = Future()
        with self._changed:
            if not self._open:
                raise RuntimeError("the server is shutting down")
            self._jobs.append((function, answer))
            self._changed.notify()
        return answer

    def warm_up(self, key: Key, item: Any) -> None:
        """Compile every size for `key`, and measure what each takes.

        The best of two calls counts, so that compiling does not.
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
        """How many items wait, by key."""
        with self._changed:
            return {key: len(queue) for key, queue in self._queues.items()}

    def seconds_per_item(self, key: Key) -> float:
        """What an item takes in the best batch; 0 before `warm_up`."""
        known = [t / size for (other, size), t in self._seconds.items() if other == key]
        return min(known, default=0.0)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """Take nothing more, compute what waits, and end the thread."""
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join()

    # --------------------------------------------------------------------- the device's thread

    def _work(self) -> None:
        while (task := self._next()) is not None:
            task()

    def _next(self) -> Callable[[], None] | None:
        """The next thing to do, or None when everything is done and nothing more comes."""
        with self._changed:
            while True:
                if self._jobs:
                    function, answer = self._jobs.popleft()
                    return lambda: settle(answer, function)
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
        """How many of `count` items to take: by the measured times, as many per second as can be.

        A full batch is no faster per item on a CPU, where padding costs as much as items do; on an
        accelerator a padded batch often takes no longer than the one below it.
        """
        below = [size for size in self._sizes if size <= count]
        above = [size for size in self._sizes if size > count][:1]
        best, best_rate = min(count, max(below, default=count)), 0.0
        for size in reversed(below + above):
            if (seconds := self._seconds.get((key, size))) is None:
                continue
            taken = min(size, count)
            if taken / seconds > best_rate * CLEARLY:
                best, best_rate = taken, taken / seconds
        return best

    def _run(self, key: Key, batch: Iterable[Waiting]) -> None:
        """Compute a batch; where it fails, each of its items alone, so that one fails for all."""
        wanted = [w for w in batch if w.answer.set_running_or_notify_cancel()]
        if not wanted:
            return
        start = time.perf_counter()
        try:
            rows = self._compute(key, [w.item for w in wanted])
        except Exception as error:
            if len(wanted) == 1:
                wanted[0].answer.set_exception(error)
                return
            for one in wanted:
                try:
                    row = self._compute(key, [one.item])[0]
                except Exception as own:
                    one.answer.set_exception(own)
                else:
                    _give(one.answer, row)
            return
        self._observe(key, len(wanted), time.perf_counter() - start)
        for one, row in zip(wanted, rows, strict=True):
            _give(one.answer, row)


def settle(answer: Future, function: Callable[[], Any]) -> None:
    """Call `function` and let `answer` be what it gives or raises, unless nobody waits for it."""
    if not answer.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except BaseException as error:
        answer.set_exception(error)
        if not isinstance(error, Exception):
            raise
    else:
        answer.set_result(result)


def _give(answer: Future, row: np.ndarray) -> None:
    if np.isfinite(row).all():
        answer.set_result(row)
    else:
        answer.set_exception(DataError("the model gives it an embedding that is not finite"))
