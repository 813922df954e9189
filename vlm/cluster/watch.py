"""The watch over the processes of a run: each gives signs of life, and all end when one is gone."""

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

from vlm.cluster import report_death
from vlm.errors import VlmError

PERIOD = 1.0  # seconds between signs of life
# Seconds without one after which a process counts as gone; JAX's own limit comes long after.
PATIENCE = float(os.environ.get("VLM_PATIENCE", 30))
_VERDICT, _ALIVE = "vlm/verdict", "vlm/alive/"
_GO_ON = ", and training goes on from its last checkpoint with `vlm train --resume RUN`"
# Taken once, by what says why this process ends: the watch, or the error that ends it.
_last_word = threading.Lock()
_doing = ""  # what this process is at, told with each sign of life


def service() -> Any:
    """The client of JAX's coordination service, whose key-value store all processes share."""
    return global_state.client


def start() -> None:
    """Begin to watch, in a thread of this process."""
    threading.Thread(target=_watch, name="vlm-watch", daemon=True).start()
    if jax.process_index() != 0:
        _start_death_reporter()


def end_all(error: Exception) -> None:
    """Have all processes end, each with a sentence that says what happened in this one."""
    if not _last_word.acquire(blocking=False):
        threading.Event().wait()  # the watch has said why another one failed, and ends us here
    said = f"{name(jax.process_index())} failed: {error}; all processes of the run stop"
    if not isinstance(error, VlmError):  # whose sentence has its own mend
        said += _GO_ON
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first
        service().key_value_set(_VERDICT, said)
    _linger()
    # JAX's own way out waits for processes that will never come.
    atexit.register(_leave)


def tell(doing: str) -> None:
    """Have the other processes know what this one is doing, from its next sign of life on."""
    global _doing
    _doing = doing


def told() -> dict[int, tuple[str, str]]:
    """(host, what it is doing) of each process, as its last sign of life told it."""
    try:
        signs = service().key_value_dir_get(_ALIVE)
    except jax.errors.JaxRuntimeError:
        return {}
    parts = {int(key.removeprefix(_ALIVE)): sign.split(" ", 2) for key, sign in signs}
    return {process: (host, doing) for process, (_, host, doing) in sorted(parts.items())}


def _watch() -> None:
    """Give signs of life and end this process when another is gone. Process 0 looks at them all."""
    client, me = service(), jax.process_index()
    seen = {i: ("", time.monotonic()) for i in range(jax.process_count())}
    beat, looked = 0, time.monotonic()
    while True:
        beat += 1
        if time.monotonic() - looked > 5 * PERIOD:  # we were asleep ourselves: look afresh
            seen = {i: (last, time.monotonic()) for i, (last, _) in seen.items()}
        looked = time.monotonic()
        try:
            client.key_value_set(f"{_ALIVE}{me}", f"{beat} {socket.gethostname()} {_doing}", True)
            verdict = _get(client, _VERDICT)
            if me == 0 and verdict is None:
                missing = _missing(dict(client.key_value_dir_get(_ALIVE)), seen)
                if missing is not None:
                    verdict = _after_death(missing)
                    client.key_value_set(_VERDICT, verdict)
        except jax.errors.JaxRuntimeError:
            return  # process 0 is gone, and JAX ends us (see `report_death`), or we are at the end
        news = verdict is not None and not verdict.startswith(name(me))
        if news and _last_word.acquire(blocking=False):
            print(f"vlm: {verdict}", file=sys.stderr, flush=True)
            _linger()
            _leave()
        time.sleep(PERIOD)


def _missing(beats: dict[str, str], seen: dict[int, tuple[str, float]]) -> str | None:
    """Who has given no sign of life for too long; updates `seen`, (beat, when) of each process."""
    now, silent = time.monotonic(), {}
    for process, (beat, when) in seen.items():
        new = beats.get(f"{_ALIVE}{process}", "")
        if new != beat:
            seen[process] = new, now
        else:
            silent[process] = now - when
    if max(silent.values(), default=0.0) <= PATIENCE:
        return None
    # Hosts that died together gave their last signs within two periods.
    gone = [process for process, seconds in silent.items() if seconds > PATIENCE - 2 * PERIOD]
    named = [f"{name(i)} on {seen[i][0].split(' ')[1]}" if seen[i][0] else name(i) for i in gone]
    who = " and ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
    return f"{who} died: no sign of life for {PATIENCE:.0f} s"


def _get(client, key: str) -> str | None:
    try:
        return client.key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def name(process: int) -> str:
    """What messages call a process."""
    return f"process {process} of {jax.process_count()}"


def _linger() -> None:
    """The verdict lies with process 0: it goes last."""
    if jax.process_index() == 0:
        time.sleep(3 * PERIOD)


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    _end_death_reporter()
    os._exit(1)


_death_reporter: subprocess.Popen | None = None  # see `report_death`


def _start_death_reporter() -> None:
    """Have it said if this process ends because process 0 is gone."""
    global _death_reporter
    address = global_state.coordinator_address or ""
    host, _, port = address.rpartition(":")
    sentence = f"vlm: {_after_death(f'{name(0)} at {address} died')}"
    _death_reporter = subprocess.Popen(
        [sys.executable, "-S", "-E", report_death.__file__, host.strip("[]"), port, sentence],
        stdin=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C is not meant for it
    )
    atexit.register(_end_death_reporter)


def _end_death_reporter() -> None:
    """This process ends in order, or has said itself why it ends: nothing is left to say."""
    if _death_reporter is not None and _death_reporter.poll() is None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            _death_reporter.communicate(b"left", timeout=5)


def _after_death(verdict: str) -> str:
    return f"{verdict}; all processes of the run stop{_GO_ON}"
