"""Supervisors restart training with the hosts that remain.

Real runs: `tests/training/elastic_faults.py`.
"""

import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
from etils import epath

from vlm.cluster import elastic, watch
from vlm.cluster.elastic import Group, Hosts, Supervisor
from vlm.errors import ConfigError


def hosts_in(folder: Path, count: int) -> list[Hosts]:
    """Hosts that have seen each other alive and waiting."""
    hosts = [Hosts(epath.Path(folder), i) for i in range(count)]
    for _ in range(3):
        for i, host in enumerate(hosts):
            host.beat(state="waiting", address=f"host{i}:1")
    return hosts


def supervisor(hosts: Hosts, problem=lambda count: "", fewest=2, most=4, **more) -> Supervisor:
    return Supervisor(
        **{
            "hosts": hosts,
            "fewest": fewest,
            "most": most,
            "address": "127.0.0.1",
            "rejoin_timeout": 10.0,
            "max_restarts": 2,
            "arguments": ("config",),
            "command": lambda: ["true"],
            "problem": problem,
            "progress": lambda: 0,
            "starts": lambda: 1,
        }
        | more
    )


def test_all_hosts_are_a_group_at_once(tmp_path):
    hosts = hosts_in(tmp_path, 4)
    supervisor(hosts[0])._form(0, hosts[0].alive("waiting"), waited=0.0)
    group = hosts[3].newest_group()
    assert group == Group(
        0, {i: host.session for i, host in enumerate(hosts)}, "host0:1", ("config",)
    )


def test_those_who_remain_are_a_group_after_the_timeout(tmp_path, capsys):
    hosts = hosts_in(tmp_path, 3)

    def problem(count: int) -> str:
        return "batch_size 16 does not divide over the 3 devices" if count == 3 else ""

    lead = supervisor(hosts[0], problem)
    lead._form(7, [0, 1, 2], waited=9.0)
    assert hosts[1].newest_group() is None
    lead._form(7, [0, 1, 2], waited=10.0)
    group = hosts[1].newest_group()
    assert group is not None
    assert group.hosts == [0, 1]
    assert "going on with 2 processes of 4, 1 idle: batch_size 16" in capsys.readouterr().err


def test_too_few_hosts_are_an_error_with_the_reason(tmp_path):
    (host,) = hosts_in(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"1 process came in 10 s .* needs at least 2: start the"):
        supervisor(host)._form(0, [0], waited=10.0)
    lead = supervisor(hosts_in(tmp_path, 2)[0], lambda count: "no")
    with pytest.raises(ConfigError, match=r"2 processes came in 10 s .*, and no: start"):
        lead._form(0, [0, 1], waited=10.0)


def test_a_silent_or_restarted_host_is_lost(tmp_path, monkeypatch):
    hosts = hosts_in(tmp_path, 3)
    group = Group(0, {i: host.session for i, host in enumerate(hosts)}, "", ())
    assert hosts[0].lost(group) == []
    again = hosts_in(tmp_path, 2)[1]  # hosts 0 and 1 with other sessions
    again.beat(state="waiting")
    hosts[2].beat(state="running", group=0, code=None)
    assert hosts[2].lost(group) == [0, 1]
    monkeypatch.setattr(watch, "HEARTBEAT_TIMEOUT", -1.0)
    assert hosts[2].lost(group) == [0, 1, 2]


@pytest.mark.parametrize(
    ("codes", "outcome"),
    [
        ((0, 0), 0),  # the run has ended
        ((76, 76), None),  # a signal stopped it before its last step
        ((0, 76), None),
        ((-9, 75), None),
        ((-9, 1), None),  # an error that follows from a death
        ((1, 75), None),
        ((1, 1), 1),  # an error for the user to fix
        ((1, 76), 1),
        ((0, 2), 2),
    ],
)
def test_what_follows_from_the_exit_codes_of_a_group(tmp_path, codes, outcome):
    hosts = hosts_in(tmp_path, 2)
    group = Group(3, {i: host.session for i, host in enumerate(hosts)}, "", ())
    for _ in range(2):
        for host, code in zip(hosts, codes, strict=True):
            host.beat(group=3, code=code)
    for host in hosts:
        follows = supervisor(host)
        assert follows._outcome(group, follows._exit_codes(group)) == outcome
    newest = hosts[0].newest_group()
    assert (newest is not None and newest.finished) == (outcome == 0)


def test_a_host_that_trains_again_has_ended_before(tmp_path):
    """Its exit code is overwritten, and means a restart, which all hosts decide alike."""
    hosts = hosts_in(tmp_path, 2)
    group = Group(3, {i: host.session for i, host in enumerate(hosts)}, "", ())
    hosts[0].beat(state="running", group=4, code=None)
    hosts[1].beat(group=3, code=-9)
    follows = supervisor(hosts[1])
    assert follows._outcome(group, follows._exit_codes(group)) is None


def ended(hosts: list[Hosts], number: int, *codes: int, **changes: str) -> list[int]:
    """Let the training of some hosts end; return the hosts that the first one sees waiting."""
    sessions = {host.host: host.session for host in hosts}
    hosts[0].write_group(Group(number, sessions, "", ("config",)))
    for _ in range(2):
        for host, code in zip(hosts, codes, strict=True):
            host.beat(group=number, code=code)
    hosts[-1].beat(**changes)
    hosts[0].beat()
    return hosts[0].alive("waiting")


def test_after_a_planned_stop_the_absent_are_not_waited_for(tmp_path):
    """One host leaves on SIGTERM, or one comes back: the group is formed at once."""
    hosts = hosts_in(tmp_path, 4)
    waiting = ended(hosts, 3, 76, 76, 76, 76, state="left")
    assert waiting == [0, 1, 2]
    supervisor(hosts[0])._form(4, waiting, waited=0.0)
    group = hosts[0].newest_group()
    assert group is not None
    assert (group.number, group.hosts) == (4, [0, 1, 2])
    waiting = ended(hosts[1:3], 4, 76, 76)
    hosts[0].beat()
    supervisor(hosts[0])._form(5, waiting, waited=0.0)
    group = hosts[0].newest_group()
    assert group is not None
    assert (group.number, group.hosts) == (5, [0, 1, 2])


def test_the_dead_and_new_supervisors_are_waited_for(tmp_path, monkeypatch):
    hosts = hosts_in(tmp_path, 3)
    waiting = ended(hosts, 3, 0, 0, 0)  # the run has ended
    supervisor(hosts[0])._form(4, waiting, waited=0.0)
    waiting = ended(hosts, 3, 75, 75, -9)
    Hosts(hosts[2].folder, 2).beat(state="waiting")  # it was started again
    hosts[0].beat()
    supervisor(hosts[0])._form(4, waiting, waited=0.0)
    hosts[2].beat()
    hosts[0].beat()
    supervisor(hosts[0])._form(4, [0, 1], waited=0.0)  # without host 2, which is dead
    group = hosts[0].newest_group()
    assert group is not None
    assert group.number == 3
    supervisor(hosts[0])._form(4, [0, 1, 2], waited=0.0)
    assert (group := hosts[0].newest_group()) is not None
    assert group.number == 4


def test_the_time_of_an_outage_of_the_folder_counts_for_no_host(tmp_path, monkeypatch, capsys):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(elastic, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(watch, "HEARTBEAT_TIMEOUT", 30.0)
    folder = tmp_path / "elastic"
    folder.mkdir()
    hosts = hosts_in(folder, 2)
    group = Group(0, {i: host.session for i, host in enumerate(hosts)}, "", ())
    folder.rename(tmp_path / "away")
    clock.now += 31
    hosts[0].beat(code=3)  # an error would end its training
    hosts[0].beat()
    assert capsys.readouterr().err.count("cannot be used now (No such file or directory)") == 1
    assert hosts[0].lost(group) == []
    hosts[0].check()
    clock.now += 570
    with pytest.raises(
        ConfigError, match=r"could not be used for 601 s \(No such file.*start again"
    ):
        hosts[0].check()
    (tmp_path / "away").rename(folder)
    hosts[0].beat()
    hosts[0].check()
    assert hosts[0].lost(group) == []
    hosts[1].beat()
    assert hosts[1].records[0]["code"] == 3
    for _ in range(31):  # the folder works, and host 1 is silent
        clock.now += 1
        hosts[0].beat()
    assert hosts[0].lost(group) == [1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a read of a named pipe blocks")
def test_a_host_whose_read_blocks_stays_alive_for_a_while(tmp_path, monkeypatch):
    """The pipe stands for a mount that stalls: a read of it waits for a writer."""
    monkeypatch.setattr(elastic, "PERIOD", 0.05)
    monkeypatch.setattr(elastic, "OUTAGE_LIMIT", 1.5)
    monkeypatch.setattr(watch, "HEARTBEAT_TIMEOUT", 0.5)
    pipe, other, alive_at = tmp_path / "pipe", Hosts(epath.Path(tmp_path), 1), []
    os.mkfifo(pipe)

    def wait_until_lost() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            other.beat(state="waiting")
            if other.alive("running") == [0]:
                alive_at.append(time.monotonic())
            elif alive_at:
                break
            time.sleep(0.05)
        pipe.write_text("true")

    waiting = threading.Thread(target=wait_until_lost)
    waiting.start()
    hosts = Hosts(epath.Path(tmp_path), 0)
    assert supervisor(hosts, fewest=1, most=1, command=lambda: [pipe.read_text()]).run() == 0
    waiting.join()
    assert 1.0 < alive_at[-1] - alive_at[0] < 30


def test_why_a_run_does_not_fit_is_found_once_for_a_start(tmp_path):
    asked = []

    def problem(count: int) -> str:
        asked.append(count)
        return "no"

    hosts = hosts_in(tmp_path, 4)
    lead = supervisor(hosts[0], problem, fewest=3)
    group = Group(0, {i: host.session for i, host in enumerate(hosts[:2])}, "", ())
    assert not any(lead._can_grow(group, 0) for _ in range(5))
    assert asked == [4, 3]
    lead._joined = 1
    lead._can_grow(group, 0)
    assert asked == [4, 3, 4, 3]


def test_a_group_grows_once_it_has_begun_to_train(tmp_path):
    hosts = hosts_in(tmp_path, 3)
    starts = []
    lead = supervisor(hosts[0], most=3, starts=lambda: len(starts))
    group = Group(0, {i: host.session for i, host in enumerate(hosts[:2])}, "", ())
    assert not lead._can_grow(group, 0)
    starts.append("row of the history")
    assert lead._can_grow(group, 0)


def test_planned_restarts_are_no_failures(tmp_path, monkeypatch):
    """Four of them without a new checkpoint do not end a run; then three failures do."""
    hosts = hosts_in(tmp_path, 2)
    group = Group(0, {i: host.session for i, host in enumerate(hosts)}, "", ())
    ends = iter([[76, 76]] * 4 + [[75, -9]] * 3 + [[0, 0]])
    lead = supervisor(hosts[0])
    monkeypatch.setattr(lead, "_join", lambda: group)
    monkeypatch.setattr(lead, "_train", lambda group: None)
    monkeypatch.setattr(lead, "_exit_codes", lambda group: next(ends))
    with pytest.raises(ConfigError, match="failed 3 times in a row without a new checkpoint"):
        lead.run()
    assert list(ends) == [[0, 0]]


SUPERVISOR = """
import sys
from etils import epath
from vlm.cluster import elastic, watch
elastic.PERIOD, elastic.KILL_DELAY, watch.HEARTBEAT_TIMEOUT = 0.1, 0.5, 3.0
folder, host = epath.Path(sys.argv[1]), int(sys.argv[2])
command = [sys.executable, "-S", "-c", sys.argv[3], str(folder)]
sys.exit(elastic.Supervisor(
    elastic.Hosts(folder, host), 2, 3, "127.0.0.1", 2.0, 2, (), lambda: command, lambda count: "",
    *[lambda: len(list(folder.glob("pid-*")))] * 2,
).run())
"""
# Runs until the file `end` is there, or one process of its start has had a SIGTERM (exit code 76).
TRAINING = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
stop = folder / f"stop-{os.environ['JAX_COORDINATOR_ADDRESS']}"
signal.signal(signal.SIGTERM, lambda *_: stop.touch())
name = f"pid-{os.environ['JAX_PROCESS_ID']}-of-{os.environ['JAX_NUM_PROCESSES']}-{time.time()}"
(folder / f".{name}").write_text(str(os.getpid()))
(folder / f".{name}").rename(folder / name)
while not (folder / "end").exists() and not stop.exists():
    time.sleep(0.05)
sys.exit(0 if (folder / "end").exists() else 76)
"""


def start(folder: Path, host: int) -> subprocess.Popen:
    command = [sys.executable, "-c", SUPERVISOR, str(folder), str(host), TRAINING]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def started(folder: Path, count: int, before: set[Path]) -> dict[int, int]:
    """Wait for a new start with so many processes; return their pids."""
    end = time.monotonic() + 120
    while True:
        paths = set(folder.glob(f"pid-*-of-{count}-*")) - before
        if len(paths) == count:
            before |= paths
            return {int(path.name.split("-")[1]): int(path.read_text()) for path in paths}
        assert time.monotonic() < end, sorted(folder.iterdir())
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes die with their parent on Linux")
def test_supervisors_restart_shrink_and_grow(tmp_path):
    supervisors, seen = {host: start(tmp_path, host) for host in range(3)}, set()
    try:
        pids = started(tmp_path, 3, seen)
        os.kill(pids[0], signal.SIGKILL)  # the coordinator process
        pids = started(tmp_path, 3, seen)
        os.kill(pids[1], signal.SIGTERM)  # not by its supervisor
        pids = started(tmp_path, 3, seen)
        supervisors[0].kill()  # its host
        supervisors[0].communicate()
        shrunk = started(tmp_path, 2, seen)
        assert not any(map(alive, pids.values()))
        supervisors[0] = start(tmp_path, 0)
        started(tmp_path, 3, seen)
        assert not any(map(alive, shrunk.values()))
        supervisors[2].terminate()  # it leaves, and the others go on
        assert supervisors[2].wait(60) == 0
        started(tmp_path, 2, seen)
        (tmp_path / "end").touch()
        assert [supervisors[host].wait(60) for host in range(2)] == [0, 0]
        assert "the run has ended" in start(tmp_path, 2).communicate(timeout=60)[1]
    finally:
        for process in supervisors.values():
            process.kill()
