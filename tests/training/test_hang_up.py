"""A run outlives its terminal: an ssh session that closes saves a checkpoint, and nohup goes on."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest
from processes import LIMIT, environment, last_step, losses, wait, weights, write_config
from test_hosts import Pair

from vlm.training import console
from vlm.training.interrupt import Interrupted

# A session leader with `terminal` as its controlling terminal, as an ssh server starts it.
IN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(1, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "vlm", *sys.argv[1:]])
"""


def until(step: int, run, process) -> None:
    end = time.monotonic() + LIMIT
    while last_step(run) < step:
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < end, "the run did not come so far"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_closed_terminal_saves_a_checkpoint_and_the_run_resumes_bit_for_bit(tiny, tmp_path):
    config = write_config(tiny(steps=400, log_every=1), tmp_path / "config.json")
    run, whole = tmp_path / "run", tmp_path / "whole"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL, "train", config, "--run-dir", run],
        env=environment(GLIBC_TUNABLES="glibc.malloc.hugetlb=0", TERM="xterm"),
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    seen = bytearray()

    def read() -> None:
        while (part := _read(ours)) and not closing.is_set():
            seen.extend(part)

    closing = threading.Event()
    reader = threading.Thread(target=read)
    reader.start()
    until(20, run, process)
    closing.set()
    reader.join()
    os.close(ours)  # the kernel sends SIGHUP, and writes to the terminal fail from now on
    assert process.wait(LIMIT) == 0
    left = last_step(run)
    assert 20 <= left < 400
    assert str(left) in os.listdir(run / "checkpoints")
    assert b"/400" in seen  # the progress display

    for name, options in ("resumed", ["--resume", run]), ("whole", [config, "--run-dir", whole]):
        log = tmp_path / f"{name}.log"
        with log.open("w") as out:
            again = subprocess.Popen(
                [sys.executable, "-m", "vlm", "train", *options],
                env=environment(), stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
        wait(again, log)
    assert weights(run) == weights(whole)
    assert losses(run) == losses(whole)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


@pytest.mark.slow
def test_a_closed_pipe_is_no_reason_to_stop(tiny, tmp_path):
    """ssh without a terminal: the server closes the pipes, and no signal comes."""
    config = write_config(tiny(steps=200, log_every=1), tmp_path / "config.json")
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "vlm", "train", config, "--run-dir", run],
        env=environment(GLIBC_TUNABLES="glibc.malloc.hugetlb=0"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while b"step 5/" not in process.stderr.readline():
        assert process.poll() is None
    process.stderr.close()
    assert process.wait(LIMIT) == 0
    assert len(losses(run)) == 200
    assert (run / "bundle").is_dir()


@pytest.mark.slow
def test_nohup_goes_on(tiny, tmp_path):
    config = write_config(tiny(steps=60, log_every=1), tmp_path / "config.json")
    run, log = tmp_path / "run", tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            ["nohup", sys.executable, "-m", "vlm", "train", config, "--run-dir", run],
            env=environment(GLIBC_TUNABLES="glibc.malloc.hugetlb=0"),
            stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    until(5, run, process)
    process.send_signal(signal.SIGHUP)
    wait(process, log)
    assert len(losses(run)) == 60


@pytest.mark.slow
def test_a_hang_up_of_one_host_stops_all_with_a_checkpoint(tiny, tmp_path):
    config = write_config(tiny(steps=2_000, log_every=1), tmp_path / "config.json")
    run = tmp_path / "run"
    two = Pair([config, "--run-dir", run], tmp_path)
    until(5, run, two.processes[0])
    two.processes[1].send_signal(signal.SIGHUP)
    assert "stopped at step" in two.wait(0, 0)[0]
    assert str(last_step(run)) in os.listdir(run / "checkpoints")


def test_a_hang_up_asks_to_stop_unless_it_is_ignored():
    before = signal.getsignal(signal.SIGHUP)
    try:
        with Interrupted() as interrupted:
            assert not interrupted.is_due()
            signal.raise_signal(signal.SIGHUP)
            assert interrupted.is_due()
            signal.raise_signal(signal.SIGHUP)  # again: no harm
        assert signal.getsignal(signal.SIGHUP) == before
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Interrupted() as interrupted:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupted.is_due()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_output_to_a_closed_terminal_is_dropped(monkeypatch):
    dropped = []
    monkeypatch.setattr(console, "drop_output", lambda *streams: dropped.append(streams))
    with console.output_may_close():
        raise OSError(5, "Input/output error")
    console.console.on_broken_pipe()
    assert dropped == [(2,), (2,)]
    with pytest.raises(ValueError, match="no error of the output"), console.output_may_close():
        raise ValueError("no error of the output")
