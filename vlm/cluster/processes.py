"""Rendezvous, synchronisation and joint failure of the processes of a run, one per host.

JAX's coordination service does the rendezvous. This module adds failure handling: when a process
dies, all others exit within a bounded time, with a message that names the dead process.
"""

import atexit
import collections
import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from vlm._deprecation import environment
from vlm.cluster import watch
from vlm.errors import ConfigError, VlmError

# Rendezvous timeout, and delay before a "still waiting" message, in seconds.
RENDEZVOUS_TIMEOUT = environment("VLM_RENDEZVOUS_TIMEOUT", "VLM_MEETING", 300)
WAITING_MESSAGE_DELAY = 20.0


def start(
    coordinator: str | None = None, process_count: int | None = None, process_id: int | None = None
) -> None:
    """Join the other processes of this run, if there are any, before anything uses JAX.

    Missing arguments come from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or
    from the cluster that JAX recognises: Cloud TPU, SLURM, Open MPI, a Kubernetes Job or JobSet.

    Args:
        coordinator: "host:port" of process 0, the same in all processes.
        process_count: number of processes.
        process_id: index of this process.

    Raises:
        ConfigError: the arguments are incomplete and no cluster provides the rest, or JAX is
            already in use.

    Example:
        >>> vlm.cluster.start(coordinator="10.0.0.1:1234")
        Traceback (most recent call last):
            ...
        vlm.errors.ConfigError: ...
    """
    given = (
        coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        _number(process_count, "JAX_NUM_PROCESSES"),
        _number(process_id, "JAX_PROCESS_ID"),
    )
    # Registered before JAX's own handler, and so called after it: that one waits for all processes,
    # which need the heartbeats of this one until then.
    atexit.register(watch.stop)
    try:
        with _rendezvous_timeout(given[0] or "their coordinator", given[1] or "of them"):
            jax.distributed.initialize(*given, initialization_timeout=int(RENDEZVOUS_TIMEOUT) + 60)
    except ValueError as error:  # JAX recognises no cluster that provides the rest
        if given == (None, None, None):
            return
        raise ConfigError(
            f"a run of several processes needs the coordinator's host:port, the number of "
            f"processes and the id of each, and has {given[0]}, {given[1]} and {given[2]}: give "
            f"all three ({str(error).rstrip('.')})"
        ) from None
    except RuntimeError as error:
        late = "before any JAX calls" in str(error)
        if late and given == (None, None, None):
            return
        fix = "start them before anything uses JAX" if late else "start all of them again"
        if not late:
            watch.exit_for_retry()
        raise ConfigError(
            f"the processes of the run did not all connect to {given[0]}: {fix} "
            f"({str(error).splitlines()[0]})"
        ) from None
    if jax.process_count() > 1:
        watch.start()


@contextlib.contextmanager
def _rendezvous_timeout(address: str, count: int | str) -> Iterator[None]:
    """Exit with a message if the other processes do not arrive in time.

    JAX's own timeout aborts from a C++ thread, with the stack trace of that thread.
    """

    def log(text: str) -> None:
        print(f"vlm: {text}", file=sys.stderr, flush=True)

    def abort() -> None:
        log(
            f"the processes of the run did not all connect to {address} in "
            f"{RENDEZVOUS_TIMEOUT:.0f} s (VLM_RENDEZVOUS_TIMEOUT): start all {count}, and check "
            "that each reaches process 0 there"
        )
        os._exit(watch.RETRY)

    waiting = f"waiting at {address} for the other processes of the run"
    timers = (
        threading.Timer(WAITING_MESSAGE_DELAY, log, [waiting]),
        threading.Timer(RENDEZVOUS_TIMEOUT, abort),
    )
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


@contextlib.contextmanager
def stop_all_on_failure() -> Iterator[None]:
    """Stop all processes if the block raises in one of them; each prints the reason.

    Example:
        >>> with vlm.cluster.stop_all_on_failure():
        ...     result = 1 + 1
        >>> result
        2
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() > 1:
            # The error may be a consequence of another process's death (CPUs communicate over Gloo,
            # whose errors look like disk errors). Then the heartbeat thread ends this process
            # during this sleep.
            if not isinstance(error, VlmError) or "Gloo" in str(error):
                time.sleep(watch.HEARTBEAT_TIMEOUT + 3 * watch.PERIOD)
            watch.stop_all(error)
        elif watch.is_retriable(error):
            watch.exit_for_retry()
        raise


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Run the block in process 0 first, then in all others.

    Example:
        >>> with vlm.cluster.first_process_first():
        ...     (folder / "prepared").mkdir(exist_ok=True)
    """
    if jax.process_count() > 1 and jax.process_index() != 0:
        multihost_utils.sync_global_devices("the first process is done")
    yield
    if jax.process_count() > 1 and jax.process_index() == 0:
        multihost_utils.sync_global_devices("the first process is done")


def broadcast_text(text: str) -> str:
    """Return the text of process 0 in all processes, without using devices.

    Example:
        >>> vlm.cluster.broadcast_text("runs/2025-01-01")
        'runs/2025-01-01'
    """
    return text if jax.process_count() == 1 else _put(text)(0)


def exchange_texts(text: str) -> list[str]:
    """Return the texts of all processes, ordered by process index, without using devices."""
    if jax.process_count() == 1:
        return [text]
    get = _put(text)
    texts = [get(process) for process in range(jax.process_count())]
    # All processes have made this call, so they have read what came before.
    while len(_published) > 1:
        watch.service().key_value_delete(_published.popleft())
    return texts


def process_name(process: int | None = None) -> str:
    """Name of a process in messages; by default of this one."""
    return watch.name(jax.process_index() if process is None else process)


_calls = itertools.count()  # all processes make the same calls in the same order
_published: collections.deque[str] = collections.deque()  # keys of this process, oldest first
# Milliseconds; the heartbeats detect dead processes much earlier.
_GET_TIMEOUT = 7 * 24 * 3600 * 1000


def _put(text: str) -> Callable[[int], str]:
    """Publish this process's text; return a function that gets the text of another process."""
    client, place = watch.service(), f"vlm/texts/{next(_calls)}/"
    key = f"{place}{jax.process_index()}"
    client.key_value_set(key, f"={text}")
    _published.append(key)
    return lambda process: client.blocking_key_value_get(f"{place}{process}", _GET_TIMEOUT)[1:]


def _number(given: int | None, variable: str) -> int | None:
    value = os.environ.get(variable) if given is None else given
    try:
        return None if value is None else int(value)
    except ValueError:
        raise ConfigError(f"{variable} is {value!r}: make it a number") from None
