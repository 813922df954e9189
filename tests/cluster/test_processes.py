"""Joining a run of several processes: what is missing is named. Real pairs: train/test_hosts.py."""

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


def test_too_late_is_said():
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


# Both fail of the same, the first process right after the other one.
BOTH_FAIL = """
import sys, time
from vlm.cluster import processes, watch
from vlm.errors import ConfigError

processes.start(sys.argv[1], 2, int(sys.argv[2]))
try:
    with processes.stop_all_on_failure():
        while sys.argv[2] == "0" and watch._get(watch.service(), watch._VERDICT) is None:
            time.sleep(0.01)
        raise ConfigError("batch_size 8 does not divide: choose 6")
except ConfigError as error:
    sys.exit(f"vlm: {error}")
"""


def test_what_all_fail_of_each_says_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    lines = [[sys.executable, "-c", BOTH_FAIL, address, number] for number in ("0", "1")]
    both = [subprocess.Popen(line, stderr=subprocess.PIPE, text=True) for line in lines]
    for process in both:
        said = [x for x in process.communicate()[1].splitlines() if x.startswith("vlm: ")]
        assert process.returncode == 1
        assert len(said) == 1
        assert "batch_size 8 does not divide: choose 6" in said[0]
        assert "--resume" not in said[0]  # it would fail again


def test_who_gave_no_sign_of_life_is_named(monkeypatch):
    clock = iter([0.0, 20.0, 31.0])
    monkeypatch.setattr(watch.time, "monotonic", lambda: next(clock))
    seen = {0: ("", 0.0), 1: ("", 0.0)}
    alive = {"vlm/alive/0": "1 a", "vlm/alive/1": "1 b"}
    assert watch._missing(alive, seen) is None
    assert watch._missing(alive | {"vlm/alive/0": "2 a"}, seen) is None
    said = watch._missing(alive | {"vlm/alive/0": "3 a"}, seen)
    assert said == "process 1 of 1 on b died: it gave no sign of life for 30 s"


@pytest.mark.parametrize(
    ("word", "answers", "said"), [("", False, "gone"), ("left", False, ""), ("", True, "")]
)
def test_a_death_is_reported_after_a_silent_end_without_process_0(word, answers, said):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if answers:
            other.listen()
        arguments = [report_death.__file__, "127.0.0.1", str(other.getsockname()[1]), "gone"]
        done = subprocess.run(
            [sys.executable, *arguments], input=word, capture_output=True, text=True, check=True
        )
    assert done.stderr.strip() == said
