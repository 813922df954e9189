"""Heartbeats between the processes of a run: all exit when one dies."""

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import jax
from jax._src.distributed import global_state  # its key-value store has no public name yet

from vlm._deprecation import environment
from vlm.cluster import report_death
from vlm.errors import DataError, VlmError
from vlm.paths import caused_by_outage

PERIOD = 1.0  # seconds between heartbeats
# Seconds without a heartbeat after which a process counts as dead; JAX's own limit is much longer.
HEARTBEAT_TIMEOUT = environment("VLM_HEARTBEAT_TIMEOUT", "VLM_PATIENCE", 30)
_FAILURE, _ALIVE = "vlm/failure", "vlm/alive/"
_RESUME = "; resume from the last checkpoint with `vlm train --resume RUN`"
RETRY = 75  # exit code if the same command may succeed after a restart (EX_TEMPFAIL of sysexits.h)
STOPPED = 76  # exit code under a supervisor if training stopped before its last step
SUPERVISED = "VLM_SUPERVISED"  # environment variable of a training process with a supervisor
# Acquired once, by the heartbeat thread or an exception: whichever reports the exit first.
_exit_report = threading.Lock()
_activity = ""  # what this process is doing; sent with each heartbeat


def service() -> Any:
    """Client of JAX's coordination service, whose key-value store all processes share."""
    return global_state.client


_thread = threading.Thread(target=lambda: _watch(), name="vlm-watch", daemon=True)
_over = threading.Event()  # the process ends


def start() -> None:
    """Start the heartbeat thread of this process."""
    _thread.start()
    if jax.process_index() != 0:
        _start_death_reporter()


def stop() -> None:
    """Stop the heartbeat thread: inside JAX's client it would abort an interpreter that ends."""
    _over.set()
    if _thread.is_alive():
        _thread.join(5 * PERIOD)


def stop_all(error: Exception) -> None:
    """Stop all processes; each prints what failed in this one."""
    if not _exit_report.acquire(blocking=False):
        threading.Event().wait()  # the heartbeat thread reports another failure and exits
    fix = _RESUME if is_retriable(error) else ""  # other errors name their own fix
    message = _stop_message(f"{name(jax.process_index())} failed: {error}", fix)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
        service().key_value_set(_FAILURE, message)
    _delay_exit_of_first()
    # JAX's own exit handler waits for processes that will never arrive.
    atexit.register(_exit, message)


def is_supervised() -> bool:
    """Whether a supervisor of an elastic run started this process."""
    return SUPERVISED in os.environ


def is_retriable(error: Exception) -> bool:
    """Whether the same command may succeed after a restart, with no fix by the user."""
    if isinstance(error, DataError):
        return caused_by_outage(error)
    return not isinstance(error, VlmError) or error.retriable


def exit_for_retry() -> None:
    """Let this process end with the exit code for a restart, if a supervisor started it."""
    if is_supervised():
        atexit.register(_exit, _RESUME)


def set_activity(activity: str) -> None:
    """Set what this process is doing, which other processes see from its next heartbeat on."""
    global _activity
    _activity = activity


def activities() -> dict[int, tuple[str, str]]:
    """Host and activity of each process, from its last heartbeat."""
    try:
        beats = service().key_value_dir_get(_ALIVE)
    except jax.errors.JaxRuntimeError:
        return {}
    parts = {int(key.removeprefix(_ALIVE)): beat.split(" ", 2) for key, beat in beats}
    return {process: (host, activity) for process, (_, host, activity) in sorted(parts.items())}


def _watch() -> None:
    """Send heartbeats and exit when another process is dead. Process 0 checks all heartbeats."""
    client, me = service(), jax.process_index()
    seen = {i: ("", time.monotonic()) for i in range(jax.process_count())}
    beat, last_check = 0, time.monotonic()
    while True:
        beat += 1
        if time.monotonic() - last_check > 5 * PERIOD:  # this process was suspended: start over
            seen = {i: (last, time.monotonic()) for i, (last, _) in seen.items()}
        last_check = time.monotonic()
        try:
            client.key_value_set(
                f"{_ALIVE}{me}", f"{beat} {socket.gethostname()} {_activity}", True
            )
            message = _get(client, _FAILURE)
            if me == 0 and message is None:
                missing = _missing(dict(client.key_value_dir_get(_ALIVE)), seen)
                if missing is not None:
                    message = _stop_message(missing)
                    client.key_value_set(_FAILURE, message)
        except jax.errors.JaxRuntimeError:
            return  # process 0 is dead and JAX aborts us (see `report_death`), or the run ends
        new = message if message and not message.startswith(name(me)) else None
        if new and _exit_report.acquire(blocking=False):
            print(f"vlm: {new}", file=sys.stderr, flush=True)
            _delay_exit_of_first()
            _exit(new)
        if _over.wait(PERIOD):
            return


def _missing(beats: dict[str, str], seen: dict[int, tuple[str, float]]) -> str | None:
    """Name the processes without a recent heartbeat; update `seen` (last beat and its time)."""
    now, silent = time.monotonic(), {}
    for process, (beat, when) in seen.items():
        new = beats.get(f"{_ALIVE}{process}", "")
        if new != beat:
            seen[process] = new, now
        else:
            silent[process] = now - when
    if max(silent.values(), default=0.0) <= HEARTBEAT_TIMEOUT:
        return None
    # Hosts that died together sent their last heartbeats within two periods.
    dead = [
        process for process, seconds in silent.items() if seconds > HEARTBEAT_TIMEOUT - 2 * PERIOD
    ]
    named = [f"{name(i)} on {seen[i][0].split(' ')[1]}" if seen[i][0] else name(i) for i in dead]
    who = " and ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
    return f"{who} died: no heartbeat for {HEARTBEAT_TIMEOUT:.0f} s"


def _get(client, key: str) -> str | None:
    try:
        return client.key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def name(process: int) -> str:
    """Name of a process in messages."""
    return f"process {process} of {jax.process_count()}"


def _delay_exit_of_first() -> None:
    """Delay the exit of process 0, which serves the failure message to the other processes."""
    if jax.process_index() == 0:
        time.sleep(3 * PERIOD)


def _exit(message: str) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    _end_death_reporter()
    os._exit(RETRY if message.endswith(_RESUME) else 1)


_death_reporter: subprocess.Popen | None = None  # see `report_death`


def _start_death_reporter() -> None:
    """Report the death of process 0 from a helper process."""
    global _death_reporter
    address = global_state.coordinator_address or ""
    host, _, port = address.rpartition(":")
    message = f"vlm: {_stop_message(f'{name(0)} at {address} died')}"
    _death_reporter = subprocess.Popen(
        [sys.executable, "-S", "-E", report_death.__file__, host.strip("[]"), port, message],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C must not reach it
    )
    atexit.register(_end_death_reporter)


def _end_death_reporter() -> None:
    """Stop the helper, because this process exits normally or has reported why it exits."""
    if _death_reporter is not None and _death_reporter.poll() is None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            _death_reporter.communicate(b"signed off", timeout=5)


def _stop_message(message: str, fix: str = _RESUME) -> str:
    return f"{message}; all processes of the run stop{fix}"
