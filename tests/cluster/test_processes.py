"""Joining a run of several processes: what is missing is named. Real pairs: train/test_hosts.py."""

import os
import socket
import subprocess
import sys

import jax
import pytest

from vlm.cluster import processes, report_death, watch
from vlm.errors import ConfigError, TrainingError


def test_outside_of_a_cluster_there_is_one_process():
    assert jax.device_count() == 8  # JAX is in use already, which is no harm here
    processes.start()
    assert jax.process_count() == 1


def test_a_late_process_is_reported():
    with pytest.raises(ConfigError, match="start them before anything uses JAX"):
        processes.start("127.0.0.1:1", 2, 0)


def test_a_part_is_not_enough():
    code = "from vlm.cluster import processes; processes.start('127.0.0.1:1', process_id=0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "needs the coordinator's host:port, the number of processes and the id" in done.stderr
    assert "has 127.0.0.1:1, None and 0: give all three" in done.stderr


@pytest.mark.parametrize("variable", ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"])
def test_a_variable_that_is_no_number_is_named(monkeypatch, variable):
    monkeypatch.setenv(variable, "two")
    with pytest.raises(ConfigError, match=f"{variable} is 'two': make it a number"):
        processes.start()


def test_alone_everything_is_itself():
    assert processes.broadcast_text("run/é") == "run/é"
    assert processes.exchange_texts("run/é") == ["run/é"]
    with processes.first_process_first():
        pass
    with pytest.raises(TrainingError, match=r"^as it was$"), processes.stop_all_on_failure():
        raise TrainingError("as it was")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("RuntimeError('INTERNAL: a device failed')", 75),
        ("vlm.TrainingError('for the user to fix')", 1),
        ("OSError(5, 'Input/output error')", 75),
        ("OSError(13, 'Permission denied')", 1),
    ],
)
def test_a_supervisor_learns_from_one_process_whether_to_restart(error, code):
    program = f"""
import vlm
from vlm.cluster import stop_all_on_failure
from vlm.paths import as_config_error
with stop_all_on_failure():
    error = {error}
    if not isinstance(error, OSError):
        raise error
    with as_config_error("the run folder cannot be read", "check it"):
        raise error
"""
    env = os.environ | {watch.SUPERVISED: "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.slow
def test_those_who_come_do_not_wait_for_ever():
    """Of three processes one never starts, as on a host that did not come up."""
    address = free_address()
    code = "import sys; from vlm.cluster import start; start(sys.argv[1], 3, int(sys.argv[2]))"
    waiting = [
        subprocess.Popen(
            [sys.executable, "-c", code, address, str(process)],
            env=os.environ | {"VLM_RENDEZVOUS_TIMEOUT": "4", "JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    for process in waiting:
        _, message = process.communicate(timeout=120)
        assert process.returncode == watch.RETRY
        assert (
            f"did not all connect to {address} in 4 s (VLM_RENDEZVOUS_TIMEOUT): start all 3"
            in message
        )
        assert "stack trace" not in message


PAIR = """
import os, sys, time
from jax.experimental import multihost_utils
from vlm.cluster import processes, watch
from vlm.errors import ConfigError
from vlm.paths import as_config_error

first = sys.argv[2] == "0"
processes.start(sys.argv[1], 2, int(sys.argv[2]))
multihost_utils.sync_global_devices("met")
try:
    with processes.stop_all_on_failure():
        {act}
except ConfigError as error:
    sys.exit(f"vlm: {{error}}")
"""
# The first process right after the other one.
BOTH_FAIL = """
        while first and watch._get(watch.service(), watch._FAILURE) is None:
            time.sleep(0.01)
        raise ConfigError("batch_size 8 does not divide: choose 6")
"""
# As where Orbax makes a folder of checkpoints, which all processes do together.
ONE_DIES = """
        if not first:
            os._exit(1)
        time.sleep(1)  # what fails later is an error of JAX, and known as one
        with as_config_error("the checkpoints cannot be listed", "resume the run"):
            multihost_utils.sync_global_devices("made")
"""


def pair(act: str, code: int = 1) -> list[list[str]]:
    """The sentences of each of two processes, which both end in an error."""
    address = free_address()
    line = [sys.executable, "-c", PAIR.format(act=act.strip()), address]
    env = os.environ | {"VLM_HEARTBEAT_TIMEOUT": "8", "XLA_FLAGS": ""}  # one device each
    both = [
        subprocess.Popen([*line, number], stderr=subprocess.PIPE, text=True, env=env)
        for number in ("0", "1")
    ]
    message = [process.communicate()[1].splitlines() for process in both]
    assert [process.returncode for process in both] == [code, 1], message
    return [[line for line in lines if line.startswith("vlm: ")] for lines in message]


@pytest.mark.slow
def test_what_all_fail_of_each_says_once():
    for message in pair(BOTH_FAIL):
        assert len(message) == 1
        assert "batch_size 8 does not divide: choose 6" in message[0]
        assert "--resume" not in message[0]  # it would fail again


@pytest.mark.slow
def test_a_death_is_not_taken_for_a_fault_of_the_disk():
    (message,), _ = pair(ONE_DIES, watch.RETRY)
    assert f"process 1 of 2 on {socket.gethostname()} died" in message


def test_who_gave_no_sign_of_life_is_named(monkeypatch):
    clock = iter([0.0, 1.0, 20.0, 30.5])
    monkeypatch.setattr(watch.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(watch.jax, "process_count", lambda: 4)
    seen = dict.fromkeys(range(4), ("", 0.0))

    def missing(*beats: int) -> str | None:
        signs = zip(beats, "abc", strict=True)
        return watch._missing(
            {f"vlm/alive/{i}": f"{n} {x}" for i, (n, x) in enumerate(signs)}, seen
        )

    assert missing(1, 1, 1) is None
    assert missing(2, 1, 2) is None
    assert missing(3, 1, 2) is None
    # The last ones sent their last heartbeats together; the one that never started has no host.
    assert missing(4, 1, 2) == (
        "process 1 of 4 on b and process 2 of 4 on c and process 3 of 4 died: no heartbeat for 30 s"
    )


@pytest.mark.parametrize(
    ("word", "answers", "message"), [("", False, "gone"), ("left", False, ""), ("", True, "")]
)
def test_a_death_is_reported_after_a_silent_end_without_process_0(word, answers, message):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if answers:
            other.listen()
        arguments = [report_death.__file__, "127.0.0.1", str(other.getsockname()[1]), "gone"]
        done = subprocess.run(
            [sys.executable, *arguments], input=word, capture_output=True, text=True, check=True
        )
    assert done.stderr.strip() == message
