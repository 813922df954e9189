"""Elastic runs: a supervisor on each host restarts training with the hosts that remain.

The supervisors meet in a folder that all hosts share, so any host may die, even the coordinator.
Each writes a record once a second. The waiting host of the lowest number forms the next group: the
hosts that train together, and the address of their coordinator.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from vlm.cluster import watch
from vlm.errors import ConfigError
from vlm.paths import as_config_error, replace_text

PERIOD = 1.0  # seconds between two records of a host
KILL_DELAY = 5.0  # seconds that a process has to report the death of another, before it is killed
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclasses.dataclass(frozen=True)
class Group:
    """Hosts that train together, with the session of the supervisor on each."""

    number: int
    sessions: Mapping[int, str]
    coordinator: str
    command: tuple[str, ...]
    finished: bool = False

    @property
    def hosts(self) -> list[int]:
        return sorted(self.sessions)


class Hosts:
    """Records of all hosts in a shared folder, of which this host writes its own.

    A host is alive if its record has changed within the heartbeat timeout. Only intervals of this
    host's clock are compared.
    """

    def __init__(self, folder: epath.Path, host: int):
        self.folder, self.host, self.session = folder, host, uuid.uuid4().hex
        self.own: dict[str, Any] = {"session": self.session, "beat": 0}
        self.records: dict[int, dict[str, Any]] = {}
        self._changed: dict[int, float] = {}  # time of each record's last change; none before it

    def beat(self, **changes: Any) -> None:
        """Write the record of this host, and read those of the others."""
        self.own |= changes | {"beat": self.own["beat"] + 1}
        _write(self.folder / f"host-{self.host}.json", self.own)
        for path in self.folder.glob("host-*.json"):
            host, record = int(path.stem.removeprefix("host-")), _read(path)
            before = self.records.get(host)
            if record is None or record == before:
                continue
            if before is not None:
                self._changed[host] = time.monotonic()
            self.records[host] = record
        self.records[self.host] = self.own
        self._changed[self.host] = time.monotonic()

    def alive(self, state: str) -> list[int]:
        """Return the hosts in a state: "waiting" or "running"."""
        limit = time.monotonic() - watch.HEARTBEAT_TIMEOUT
        hosts = (host for host, when in self._changed.items() if when > limit)
        return sorted(host for host in hosts if self.records[host].get("state") == state)

    def result(self, group: Group, host: int) -> int | None:
        """Return the exit code of a host's training process; None before its end."""
        record = self.records.get(host, {})
        if record.get("session") != group.sessions[host] or "group" not in record:
            return None
        if record["group"] > group.number:  # it has ended, and trains again
            return watch.RETRY
        return record.get("code") if record["group"] == group.number else None

    def lost(self, group: Group) -> list[int]:
        """Return the hosts of a group that died: without a record, or with another session."""
        alive = {*self.alive("waiting"), *self.alive("running")}
        return [
            host
            for host, session in group.sessions.items()
            if self.result(group, host) is None
            and (host not in alive or self.records[host]["session"] != session)
        ]

    def newest_group(self) -> Group | None:
        """Return the group that was formed last."""
        paths = self.folder.glob("group-*.json")
        numbers = sorted((int(path.stem.removeprefix("group-")) for path in paths), reverse=True)
        for number in numbers:
            if found := _read(self.folder / f"group-{number}.json"):
                sessions = {int(host): session for host, session in found["sessions"].items()}
                command = tuple(found["command"])
                return Group(**(found | {"sessions": sessions, "command": command}))
        return None

    def write_group(self, group: Group) -> None:
        _write(self.folder / f"group-{group.number}.json", dataclasses.asdict(group))


@dataclasses.dataclass
class Supervisor:
    """Runs the training process of one host, and restarts it with the hosts that remain.

    Attributes:
        hosts: the records of all hosts.
        fewest, most: number of hosts that train together.
        address: of this host, for the processes of other hosts.
        rejoin_timeout: seconds to wait for all hosts, before a start with at least `fewest`.
        max_restarts: limit of restarts in a row without progress.
        arguments: of the command, the same on all hosts.
        command: returns the command line of the next training process.
        problem: returns why the run cannot train on a number of hosts, or an empty string.
        progress: returns a value that changes with each checkpoint.
    """

    hosts: Hosts
    fewest: int
    most: int
    address: str
    rejoin_timeout: float
    max_restarts: int
    arguments: tuple[str, ...]
    command: Callable[[], list[str]]
    problem: Callable[[int], str]
    progress: Callable[[], Any]
    _joined: int = -1  # number of the last group of this host
    _signal: int | None = None  # that asked this host to leave

    def run(self) -> int:
        """Train until the run ends or cannot go on; return the exit code.

        Raises:
            ConfigError: too few hosts came, or the run failed too often.
        """
        restarts, progress = 0, self.progress()
        with self._forwarded_signals():
            while (group := self._join()) is not None:
                self._train(group)
                code = self._outcome(group)
                if code is not None:
                    return code
                restarts, progress, before = restarts + 1, self.progress(), progress
                restarts = restarts if progress == before else 1
                if restarts > self.max_restarts:
                    raise ConfigError(
                        f"the run failed {restarts} times in a row without a new checkpoint "
                        "(--max-restarts): look for the cause in the messages above, then resume it"
                    )
        return 0

    def _join(self) -> Group | None:
        """Wait until this host is in a new group; None if it leaves, or the run has ended."""
        began, there = time.monotonic(), 0
        hosts, address = self.hosts, f"{self.address}:{_free_port()}"
        while self._signal is None:
            hosts.beat(state="waiting", address=address)
            group = hosts.newest_group()
            if group and group.finished and group.command == self.arguments:
                _log(f"the run has ended; to start it again, delete {hosts.folder}")
                return None
            number = group.number if group else -1
            if group and number > self._joined and group.sessions.get(hosts.host) == hosts.session:
                self._joined = number
                return group
            running, waiting = hosts.alive("running"), hosts.alive("waiting")
            if running:
                began = time.monotonic()
            elif hosts.host == waiting[0]:
                if len(waiting) != there < self.most:
                    there = len(waiting)
                    _log(f"{there} of {self.most} processes are there")
                self._form(number + 1, waiting, time.monotonic() - began)
            time.sleep(PERIOD)
        hosts.beat(state="left")
        return None

    def _form(self, number: int, waiting: list[int], waited: float) -> None:
        """Form a group, if all hosts are there or the time to wait for them is over."""
        if len(waiting) < self.most:
            if waited < self.rejoin_timeout:
                return
            count = self._largest(len(waiting))
            if count is None:
                reasons = [self.problem(n) for n in range(len(waiting), self.fewest - 1, -1)]
                why = reasons[0] if reasons else f"the run needs at least {self.fewest}"
                raise ConfigError(
                    f"{_count(len(waiting))} came in {self.rejoin_timeout:.0f} s "
                    f"(--rejoin-timeout), and {why}: start the others again"
                )
            spare = len(waiting) - count
            _log(
                f"going on with {_count(count)} of {self.most}"
                + (f", and {spare} to spare: {self.problem(count + 1)}" if spare else "")
            )
            waiting = waiting[:count]
        sessions = {host: self.hosts.records[host]["session"] for host in waiting[: self.most]}
        coordinator = self.hosts.records[waiting[0]]["address"]
        self.hosts.write_group(Group(number, sessions, coordinator, self.arguments))

    def _largest(self, count: int) -> int | None:
        """Return the largest number of hosts, up to `count`, that the run can train on."""
        counts = range(min(count, self.most), self.fewest - 1, -1)
        return next((n for n in counts if not self.problem(n)), None)

    def _train(self, group: Group) -> None:
        """Run the training process of this host until it ends, or a host of the group is lost."""
        hosts, lost_since, asked = self.hosts, None, False
        hosts.beat(state="running", group=group.number, code=None)
        process = _start(self.command(), group, hosts.host)
        try:
            while process.poll() is None:
                time.sleep(PERIOD)
                hosts.beat()
                if self._signal is not None and not asked:
                    asked = True
                    hosts.beat(stopping=group.number)
                    process.send_signal(signal.SIGTERM)
                ended = [host for host in group.hosts if hosts.result(group, host)]
                lost = hosts.lost(group) + ended
                if not lost:
                    lost_since = None
                elif lost_since is None:
                    lost_since = time.monotonic()
                elif time.monotonic() - lost_since > KILL_DELAY:
                    _log(f"process {lost[0]} is lost: stopping that of this host")
                    break
                newest = hosts.newest_group()
                if newest and newest.number >= group.number and newest != group:
                    break  # the others took this host for lost
                if not lost and not asked and self._can_grow(group):
                    asked = True
                    _log("more processes are there: saving a checkpoint, and starting with them")
                    hosts.beat(stopping=group.number)
                    process.send_signal(signal.SIGTERM)
        finally:
            process.kill()
            process.wait()
        hosts.beat(state="waiting", code=process.returncode)

    def _can_grow(self, group: Group) -> bool:
        """Whether this host leads a group that could be larger."""
        size, waiting = len(group.hosts), self.hosts.alive("waiting")
        others = [host for host in waiting if host not in group.sessions]
        if not others or self.hosts.host != group.hosts[0] or size == self.most:
            return False
        return (self._largest(size + len(others)) or 0) > size

    def _outcome(self, group: Group) -> int | None:
        """Return the exit code once all hosts of a group have ended; None to train again."""
        hosts = self.hosts
        while any(hosts.result(group, host) is None for host in group.hosts):
            if set(hosts.lost(group)) >= {h for h in group.hosts if hosts.result(group, h) is None}:
                break
            time.sleep(PERIOD)
            hosts.beat()
        codes = [hosts.result(group, host) for host in group.hosts]
        if self._signal is not None:
            hosts.beat(state="left")
            return 0
        if any(code is None or code < 0 or code == watch.RETRY for code in codes):
            return None
        if any(codes):
            return max(filter(None, codes))
        records = (hosts.records.get(host, {}) for host in group.hosts)
        if any(record.get("stopping") == group.number for record in records):
            return None
        hosts.write_group(dataclasses.replace(group, finished=True))
        return 0

    @contextlib.contextmanager
    def _forwarded_signals(self) -> Iterator[None]:
        def handle(number: int, frame: Any) -> None:
            if self._signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._signal = number

        before = {number: signal.signal(number, handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def local_address() -> str:
    """Return the address of this host that other hosts of its network can reach."""
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
        if not address.startswith("127."):
            return address
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect(("192.0.2.1", 9))  # sends nothing; chooses the interface of the route
        return route.getsockname()[0]
    return "127.0.0.1"


def _start(command: list[str], group: Group, host: int) -> subprocess.Popen:
    """Start the training process, which dies with its supervisor."""
    number = group.hosts.index(host)
    _log(
        f"starting process {number} of {len(group.hosts)} (start {group.number}, coordinator "
        f"{group.coordinator})"
    )
    env = os.environ | {
        "JAX_COORDINATOR_ADDRESS": group.coordinator,
        "JAX_NUM_PROCESSES": str(len(group.hosts)),
        "JAX_PROCESS_ID": str(number),
    }
    libc = ctypes.CDLL(None)  # loaded here: the forked process must not allocate much
    pr_set_pdeathsig = 1
    return subprocess.Popen(
        command,
        env=env,
        start_new_session=True,  # Ctrl-C reaches it by its supervisor only
        preexec_fn=lambda: libc.prctl(pr_set_pdeathsig, signal.SIGKILL),
    )


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def _write(file: epath.Path, content: dict[str, Any]) -> None:
    with as_config_error(f"{file} cannot be written", "make it writable, and start again"):
        replace_text(file, json.dumps(content))


def _read(file: epath.Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(file.read_text())
    return None


def _count(hosts: int) -> str:
    return f"{hosts} {'process' if hosts == 1 else 'processes'}"


def _log(text: str) -> None:
    print(f"vlm: {text}", file=sys.stderr, flush=True)
