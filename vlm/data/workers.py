"""Reader processes: signals not meant for them, their end with the run, the memory they share."""

import contextlib
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Iterator

from vlm.errors import DataError

SHARED_MEMORY = "/dev/shm"  # where grain's workers hand over their batches
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def deaf_to_signals() -> Iterator[None]:
    """Processes that are started in here never hear Ctrl-C or SIGTERM.

    Terminals and clusters send these to a whole process group. The run itself answers them: it
    takes the step at hand, for which it needs its workers, saves it, and closes them.
    """
    # The tracker would take the mask off again if it were first started in here.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(*_) -> None:
    """Have this worker end when the run is killed: else it would wait for ever, memory in hand."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None  # grain starts workers alone
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def buffered_batches(workers: int, prefetch: int) -> tuple[int, int]:
    """(buffer of one worker, most batches at once in shared memory).

    `prefetch` batches are shared out over the workers. Beside its buffer each has a batch in hand,
    and grain takes as many again out of its queue before they are asked for (measured). Two more
    are with the step.
    """
    buffer = max(1, prefetch // workers)
    return buffer, workers * 2 * (buffer + 1) + 2


def check_shared_memory(workers: int, prefetch: int, batch_bytes: int) -> None:
    """Raise a DataError if the workers' batches do not fit into the free shared memory."""
    try:
        of = os.statvfs(SHARED_MEMORY)
    except OSError:
        return  # no such place on this system
    free = of.f_bavail * of.f_frsize
    _, batches = buffered_batches(workers, prefetch)
    if batches * batch_bytes > free:
        raise DataError(
            f"data.workers {workers} may hold {batches} batches of {batch_bytes / 2**20:,.0f} MiB "
            f"in {SHARED_MEMORY}, which has {free / 2**20:,.0f} MiB free: take fewer workers, a "
            "smaller batch a host, or a larger one (docker run --shm-size; in Kubernetes an "
            "emptyDir of medium Memory)"
        )
