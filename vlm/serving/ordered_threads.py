"""Threads that run waiting calls by their place in time, not in the order of their submission."""

import itertools
import queue
import threading
from collections.abc import Callable


class OrderedThreads:
    """A fixed number of threads; of the calls that wait, the earliest runs first.

    Args:
        count: of threads.
        name: of the threads.
    """

    def __init__(self, count: int, name: str):
        self._calls: queue.PriorityQueue[tuple[float, int, Callable[[], None] | None]]
        self._calls, self._number = queue.PriorityQueue(), itertools.count()
        self._open = True
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}_{i}", daemon=True)
            for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, since: float, call: Callable[[], None]) -> None:
        """Run a call, which handles its own errors, after those of an earlier time.

        Raises:
            RuntimeError: the threads are stopping.
        """
        if not self._open:
            raise RuntimeError("the server is shutting down")
        self._calls.put((since, next(self._number), call))

    def close(self) -> None:
        """Run all waiting calls and stop the threads."""
        self._open = False
        for _ in self._threads:
            self._calls.put((float("inf"), next(self._number), None))
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()[2]) is not None:
            call()
