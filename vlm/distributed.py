"""Several processes, one on each host, as one run: they start, agree, and stop together.

Starting and agreeing is JAX's coordination service. What is added here is that a run whose process
is gone ends everywhere, in a bounded time, with a sentence that says which one it was.
"""

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax._src.distributed import global_state  # its key-value store has no public name yet
from jax.experimental import multihost_utils

from vlm import last_words
from vlm.errors import ConfigError, VlmError

PERIOD = 1.0  # seconds between signs of life
# Seconds without one after which a process counts as gone; JAX's own limit comes long after.
PATIENCE = float(os.environ.get("VLM_PATIENCE", 30))
_VERDICT, _ALIVE = "vlm/verdict", "vlm/alive/"


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
    """
    given = (
        coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        _number(process_count, "JAX_NUM_PROCESSES"),
        _number(process_id, "JAX_PROCESS_ID"),
    )
    try:
        jax.distributed.initialize(*given)
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
        mend = (
            "start them before anything uses JAX"
            if late
            else f"start all {given[1]}, and check that each reaches process 0 there"
        )
        raise ConfigError(
            f"the processes of the run did not come together at {given[0]}: {mend} "
            f"({str(error).splitlines()[0]})"
        ) from None
    if jax.process_count() > 1:
        threading.Thread(target=_watch, name="vlm-watch", daemon=True).start()
        if jax.process_index() != 0:
            _start_last_words()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What runs in here fails in all processes if it fails in one, and each says why."""
    try:
        yield
    except Exception as error:
        if jax.process_count() > 1:
            if not isinstance(error, VlmError):  # maybe a neighbour died and left us an odd error
                time.sleep(PATIENCE + 3 * PERIOD)  # then the watch ends us here
            said = f"{_name(jax.process_index())} failed: {error}"
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first
                global_state.client.key_value_set(_VERDICT, said)
            _linger()
            # JAX's own farewell waits for processes that will never come.
            atexit.register(_leave)
        raise


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Process 0 runs the block before the others, who then find what it has made."""
    if jax.process_count() > 1 and jax.process_index() != 0:
        multihost_utils.sync_global_devices("the first process is done")
    yield
    if jax.process_count() > 1 and jax.process_index() == 0:
        multihost_utils.sync_global_devices("the first process is done")


def broadcast_text(text: str) -> str:
    """The text of process 0, in all processes; at most 4,096 bytes of it."""
    if jax.process_count() == 1:
        return text
    room = np.zeros(4096, np.uint8)
    encoded = np.frombuffer(text.encode()[: len(room)], np.uint8)
    room[: len(encoded)] = encoded
    return bytes(multihost_utils.broadcast_one_to_all(room)).rstrip(b"\0").decode(errors="ignore")


def _watch() -> None:
    """Give signs of life and end this process when another is gone. Process 0 looks at them all."""
    client, me = global_state.client, jax.process_index()
    seen = {i: ("", time.monotonic()) for i in range(jax.process_count())}
    beat, looked = 0, time.monotonic()
    while True:
        beat += 1
        if time.monotonic() - looked > 5 * PERIOD:  # we were asleep ourselves: look afresh
            seen = {i: (last, time.monotonic()) for i, (last, _) in seen.items()}
        looked = time.monotonic()
        try:
            client.key_value_set(f"{_ALIVE}{me}", f"{beat} {socket.gethostname()}", True)
            verdict = _get(client, _VERDICT)
            if me == 0 and verdict is None:
                verdict = _missing(dict(client.key_value_dir_get(_ALIVE)), seen)
                if verdict is not None:
                    client.key_value_set(_VERDICT, verdict)
        except jax.errors.JaxRuntimeError:
            return  # process 0 is gone, and JAX ends us (see last_words), or we are at the end
        if verdict is not None and not verdict.startswith(_name(me)):
            print(_farewell(verdict), file=sys.stderr, flush=True)
            _linger()
            _leave()
        time.sleep(PERIOD)


def _missing(beats: dict[str, str], seen: dict[int, tuple[str, float]]) -> str | None:
    """Who has given no sign of life for too long; updates `seen`, (beat, when) of each process."""
    now = time.monotonic()
    for process, (beat, when) in seen.items():
        new = beats.get(f"{_ALIVE}{process}", "")
        if new != beat:
            seen[process] = new, now
        elif now - when > PATIENCE:
            host = f" on {beat.split(' ', 1)[1]}" if beat else ""
            return f"{_name(process)}{host} died: it gave no sign of life for {PATIENCE:.0f} s"
    return None


def _get(client, key: str) -> str | None:
    try:
        return client.key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def _name(process: int) -> str:
    return f"process {process} of {jax.process_count()}"


def _linger() -> None:
    """The verdict lies with process 0: it goes last."""
    if jax.process_index() == 0:
        time.sleep(3 * PERIOD)


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    _take_leave()
    os._exit(1)


_words: subprocess.Popen | None = None  # the program beside this process: see `last_words`


def _start_last_words() -> None:
    """Have it said if this process ends because process 0 is gone."""
    global _words
    address = global_state.coordinator_address
    host, _, port = address.rpartition(":")
    sentence = _farewell(f"{_name(0)} at {address} died")
    _words = subprocess.Popen(
        [sys.executable, "-S", "-E", last_words.__file__, host.strip("[]"), port, sentence],
        stdin=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C is not meant for it
    )
    atexit.register(_take_leave)


def _take_leave() -> None:
    """This process ends in order, or has said itself why it ends: nothing is left to say."""
    if _words is not None and _words.poll() is None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            _words.communicate(b"left", timeout=5)


def _farewell(verdict: str) -> str:
    return (
        f"vlm: {verdict}; all processes of the run stop, and `vlm train --resume RUN` goes on from "
        "its last checkpoint"
    )


def _number(given: int | None, variable: str) -> int | None:
    value = os.environ.get(variable) if given is None else given
    try:
        return None if value is None else int(value)
    except ValueError:
        raise ConfigError(f"{variable} is {value!r}: make it a number") from None
