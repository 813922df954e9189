"""Several processes, one on each host, as one run: they start, agree, and stop together.

Starting and agreeing is JAX's coordination service. What is added here is that a run whose process
is gone ends everywhere, in a bounded time, with a sentence that says which one it was.
"""

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from vlm.cluster import watch
from vlm.errors import ConfigError, VlmError

# Seconds that all processes of a run have to come together, and after which that is told.
MEETING, WAITING = float(os.environ.get("VLM_MEETING", 300)), 20.0


def start(
    coordinator: str | None = None, process_count: int | None = None, process_id: int | None = None
) -> None:
    """Join the other processes of this run, if there are any. Call it before anything uses JAX.

    What is not given comes from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or
    from the cluster that JAX recognises: Cloud TPU, SLURM, Open MPI, a Kubernetes Job or JobSet.

    Args:
        coordinator: "host:port" of process 0, the same for all.

    Raises:
        ConfigError: only a part is given and no cluster knows the rest, or JAX is in use already.

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
    try:
        with _in_time(given[0] or "their coordinator", given[1] or "of them"):
            jax.distributed.initialize(*given, initialization_timeout=int(MEETING) + 60)
    except ValueError as error:  # JAX recognises no cluster that completes what is given
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
        mend = "start them before anything uses JAX" if late else "start all of them again"
        raise ConfigError(
            f"the processes of the run did not come together at {given[0]}: {mend} "
            f"({str(error).splitlines()[0]})"
        ) from None
    if jax.process_count() > 1:
        watch.start()


@contextlib.contextmanager
def _in_time(place: str, count: int | str) -> Iterator[None]:
    """End this process with a sentence if the others do not come in time.

    JAX's own limit ends it from a thread in which no Python runs, with the stack of that thread.
    """

    def say(text: str) -> None:
        print(f"vlm: {text}", file=sys.stderr, flush=True)

    def end() -> None:
        say(
            f"the processes of the run did not come together at {place} in {MEETING:.0f} s "
            f"(VLM_MEETING): start all {count}, and check that each reaches process 0 there"
        )
        os._exit(1)

    waits = f"waiting at {place} for the other processes of the run"
    timers = threading.Timer(WAITING, say, [waits]), threading.Timer(MEETING, end)
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
    """What runs in here fails in all processes if it fails in one, and each says why.

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
            # Maybe a neighbour died and left us an odd error, or one of Gloo, over which CPUs talk,
            # that was taken for one of the disk: then the watch ends us here.
            if not isinstance(error, VlmError) or "Gloo" in str(error):
                time.sleep(watch.PATIENCE + 3 * watch.PERIOD)
            watch.end_all(error)
        raise


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Process 0 runs the block before the others, who then find what it has made.

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
    """The text of process 0, in all processes; no device takes part.

    Example:
        >>> vlm.cluster.broadcast_text("runs/2025-01-01")
        'runs/2025-01-01'
    """
    return text if jax.process_count() == 1 else _put(text)(0)


def exchange_texts(text: str) -> list[str]:
    """The texts of all processes, by their index, in all processes; no device takes part."""
    if jax.process_count() == 1:
        return [text]
    get = _put(text)
    return [get(process) for process in range(jax.process_count())]


def process_name(process: int | None = None) -> str:
    """What messages call a process, by default this one."""
    return watch.name(jax.process_index() if process is None else process)


_calls = itertools.count()  # all processes make the same calls in the same order
_LONG = 7 * 24 * 3600 * 1000  # milliseconds: a process that died is noticed by the watch


def _put(text: str) -> Callable[[int], str]:
    """Lay down this process's text, and return how to get that of another one."""
    client, place = watch.service(), f"vlm/said/{next(_calls)}/"
    client.key_value_set(f"{place}{jax.process_index()}", f"={text}")
    return lambda process: client.blocking_key_value_get(f"{place}{process}", _LONG)[1:]


def _number(given: int | None, variable: str) -> int | None:
    value = os.environ.get(variable) if given is None else given
    try:
        return None if value is None else int(value)
    except ValueError:
        raise ConfigError(f"{variable} is {value!r}: make it a number") from None
