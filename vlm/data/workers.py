"""Reader processes: blocked signals, exit with the parent, and shared memory."""

import contextlib
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Iterator

from vlm.errors import DataError

SHARED_MEMORY = "/dev/shm"  # where grain's workers put their batches
_HANG_UP = {signal.SIGHUP} if hasattr(signal, "SIGHUP") else set()  # Windows has none
_SIGNALS = {signal.SIGINT, signal.SIGTERM} | _HANG_UP


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block SIGINT, SIGTERM and SIGHUP in processes that are started in this context.

    Terminals and clusters send these to the whole process group. Only the run handles them: it
    finishes the current step, for which it needs its workers, saves, and closes them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HANG_UP)
    try:
        # The tracker ignores the others, but would unblock them if it were first started below.
        multiprocessing.resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(*_) -> None:
    """Exit this worker when its parent is killed; else it would wait forever and hold memory."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None  # true in grain's workers
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def buffered_batches(workers: int, prefetch: int) -> tuple[int, int]:
    """Compute (buffer size per worker, maximum number of batches in shared memory).

    `prefetch` batches are divided over the workers. Besides its buffer each worker has one batch in
    work, and grain takes as many again from its queue early (measured). Two more are in the step.
    """
    buffer = max(1, prefetch // workers)
    return buffer, workers * 2 * (buffer + 1) + 2


def check_shared_memory(workers: int, prefetch: int, batch_bytes: int) -> None:
    """Raise a DataError if the workers' batches do not fit into free shared memory."""
    try:
        stats = os.statvfs(SHARED_MEMORY)
    except (OSError, AttributeError):
        return  # does not exist on this system
    free = stats.f_bavail * stats.f_frsize
    _, batches = buffered_batches(workers, prefetch)
    if batches * batch_bytes > free:
        raise DataError(
            f"data.workers {workers} may hold {batches} batches of {batch_bytes / 2**20:,.0f} MiB "
            f"in {SHARED_MEMORY}, which has {free / 2**20:,.0f} MiB free: use fewer "
            "workers, a smaller batch per host, or more shared memory (docker run --shm-size; in "
            "Kubernetes an emptyDir of medium Memory)"
        )
