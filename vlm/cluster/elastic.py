"""Elastic runs: a supervisor on each host restarts training with the hosts that remain.

The supervisors meet in a folder that all hosts share, so any host may die, even the coordinator.
Each writes a record once a second. The waiting host of the lowest number forms the next group: the
hosts that train together, and the address of their coordinator. The page `docs/howto/multi_host.md`
has a diagram.
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
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from etils import epath

from vlm.cluster import watch
from vlm.errors import ConfigError, VlmError
from vlm.paths import replace_text, storage_error_reason

T = TypeVar("T")
PERIOD = 1.0  # seconds between two records of a host
KILL_DELAY = 5.0  # seconds that a process has to report the death of another, before it is killed
OUTAGE_LIMIT = 600.0  # seconds for which the shared folder may fail, or block a read of a file
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
    host's clock are compared, and only time counts in which this host could use the folder.

    Attributes:
        own: the record of this host.
        records: the newest record of each host.
        newest: the group that was formed last.
    """

    def __init__(self, folder: epath.Path, host: int):
        self.folder, self.host, self.session = folder, host, uuid.uuid4().hex
        self.own: dict[str, Any] = {"session": self.session, "beat": 0}
        self.records: dict[int, dict[str, Any]] = {}
        self.newest: Group | None = None
        self._changed: dict[int, float] = {}  # time of each record's last change; none before it
        self._exchanged = time.monotonic()  # time of the last exchange of records
        self._failure = ""  # of the folder, that was logged last
        self._writing = threading.Lock()
        self._beaten = time.monotonic()  # time of the last call of `beat`

    def beat(self, **changes: Any) -> None:
        """Write the record of this host, and read those of the others and the newest group.

        A failure of the folder is logged; then the records stay as they are.
        """
        self._beaten = time.monotonic()
        with self._writing:
            self.own |= changes
        self.attempt(None, self._exchange)

    @contextlib.contextmanager
    def heartbeat(self) -> Iterator[None]:
        """Write the record of this host from a thread, too, while a read of a file blocks."""
        over = threading.Event()

        def keep_writing() -> None:
            while not over.wait(PERIOD):
                if 2 * PERIOD < time.monotonic() - self._beaten < OUTAGE_LIMIT:
                    with contextlib.suppress(Exception):  # `beat` reports it
                        self._write()

        threading.Thread(target=keep_writing, name="vlm-elastic-heartbeat", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def attempt(self, default: T, action: Callable[..., T], *arguments: Any) -> T:
        """Return the result of an action; if the folder fails, log that and return `default`."""
        try:
            return action(*arguments)
        except Exception as error:  # bucket clients have their own exception types
            cause = error.__cause__ if isinstance(error, VlmError) else error
            reason = storage_error_reason(cause) if isinstance(cause, Exception) else None
            if reason is None:
                raise
            if reason != self._failure:
                self._failure = reason
                _log(f"{self.folder} cannot be used now ({reason}): trying again")
            return default

    def check(self) -> None:
        """Raise a ConfigError if the folder has failed for longer than `OUTAGE_LIMIT`."""
        seconds = time.monotonic() - self._exchanged
        if self._failure and seconds > OUTAGE_LIMIT:
            raise ConfigError(
                f"{self.folder} could not be used for {seconds:.0f} s ({self._failure}): make it "
                "readable and writable, and start again"
            )

    def _write(self) -> None:
        with self._writing:
            self.own["beat"] += 1
            replace_text(self.folder / f"host-{self.host}.json", json.dumps(self.own))

    def _exchange(self) -> None:
        self._write()
        paths = self.folder.glob("host-*.json")
        found = {int(path.stem.removeprefix("host-")): _read(path) for path in paths}
        self.newest = self.newest_group()
        now = time.monotonic()
        outage = now - self._exchanged
        if outage > watch.HEARTBEAT_TIMEOUT / 2:  # the other hosts may have had it too
            self._changed = {host: when + outage for host, when in self._changed.items()}
            self._failure = ""
        self._exchanged = now
        for host, record in found.items():
            before = self.records.get(host)
            if record is None or record == before:
                continue
            if before is not None:
                self._changed[host] = now
            self.records[host] = record
        self.records[self.host] = self.own
        self._changed[self.host] = now

    def alive(self, state: str) -> list[int]:
        """Return the hosts in a state: "waiting" or "running"."""
        limit = self._exchanged - watch.HEARTBEAT_TIMEOUT
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

    def results(self, group: Group) -> list[int | None]:
        """Return `result` of each host of a group."""
        return [self.result(group, host) for host in group.hosts]

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
        """Read the group that was formed last."""
        paths = self.folder.glob("group-*.json")
        numbers = sorted((int(path.stem.removeprefix("group-")) for path in paths), reverse=True)
        for number in numbers:
            if found := _read(self.folder / f"group-{number}.json"):
                sessions = {int(host): session for host, session in found["sessions"].items()}
                command = tuple(found["command"])
                return Group(**(found | {"sessions": sessions, "command": command}))
        return None

    def write_group(self, group: Group) -> None:
        text = json.dumps(dataclasses.asdict(group))
        replace_text(self.folder / f"group-{group.number}.json", text)


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
        starts: returns how often training has begun.
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
    starts: Callable[[], int]
    _joined: int = -1  # number of the last group of this host
    _signal: int | None = None  # that asked this host to leave
    # why the run cannot train on a number of hosts, for each start and number
    _problems: dict[tuple[int, int], str] = dataclasses.field(default_factory=dict)

    def run(self) -> int:
        """Train until the run ends or cannot go on; return the exit code.

        Raises:
            ConfigError: too few hosts came, the run failed too often, or the shared folder cannot
                be used.
        """
        with self._forwarded_signals(), self.hosts.heartbeat():
            restarts, progress = 0, self.hosts.attempt(None, self.progress)
            while (group := self._join()) is not None:
                self._train(group)
                codes = self._exit_codes(group)
                code = self._outcome(group, codes)
                if code is not None:
                    return code
                before, progress = progress, self.hosts.attempt(progress, self.progress)
                failed = not set(codes) <= {0, watch.STOPPED}
                restarts = failed + (restarts if progress == before else 0)
                if restarts > self.max_restarts:
                    raise ConfigError(
                        f"the run failed {restarts} times in a row without a new checkpoint "
                        "(--max-restarts): look for the cause in the messages above, then resume it"
                    )
        return 0

    def _join(self) -> Group | None:
        """Wait until this host is in a new group; None if it leaves, or the run has ended."""
        began, joined = time.monotonic(), 0
        hosts, address = self.hosts, f"{self.address}:{_free_port()}"
        while self._signal is None:
            hosts.beat(state="waiting", address=address)
            hosts.check()
            group = hosts.newest
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
            elif waiting[:1] == [hosts.host]:
                if len(waiting) != joined < self.most:
                    joined = len(waiting)
                    _log(f"{joined} of {self.most} processes joined")
                waited = time.monotonic() - began
                hosts.attempt(None, self._form, number + 1, waiting, waited)
            time.sleep(PERIOD)
        hosts.beat(state="left")
        return None

    def _form(self, number: int, waiting: list[int], waited: float) -> None:
        """Form a group, if all hosts have joined or the time to wait for them is over.

        It is formed at once if all hosts of the last group wait for a restart, except those that
        left: the remaining hosts were absent before.
        """
        if len(waiting) < self.most:
            late = waited >= self.rejoin_timeout
            count = self._largest(len(waiting)) if late or self._all_back(waiting) else None
            if count is None and not late:
                return
            if count is None:
                reasons = [self._problem(n) for n in range(len(waiting), self.fewest - 1, -1)]
                why = reasons[0] if reasons else f"the run needs at least {self.fewest}"
                raise ConfigError(
                    f"{_count(len(waiting))} came in {self.rejoin_timeout:.0f} s "
                    f"(--rejoin-timeout), and {why}: start the others again"
                )
            idle = len(waiting) - count
            _log(
                f"going on with {_count(count)} of {self.most}"
                + (f", {idle} idle: {self._problem(count + 1)}" if idle else "")
            )
            waiting = waiting[:count]
        sessions = {host: self.hosts.records[host]["session"] for host in waiting[: self.most]}
        coordinator = self.hosts.records[waiting[0]]["address"]
        self.hosts.write_group(Group(number, sessions, coordinator, self.arguments))

    def _all_back(self, waiting: list[int]) -> bool:
        """Whether the hosts of the last group wait for a restart of it, except those that left."""
        hosts, group = self.hosts, self.hosts.newest
        if group is None or not _ask_for_restart(codes := hosts.results(group)) or None in codes:
            return False
        remaining = [h for h in group.hosts if hosts.records[h]["state"] != "left"]
        return bool(remaining) and set(remaining) <= set(waiting)

    def _largest(self, count: int) -> int | None:
        """Return the largest number of hosts, up to `count`, that the run can train on."""
        counts = range(min(count, self.most), self.fewest - 1, -1)
        return next((n for n in counts if not self._problem(n)), None)

    def _problem(self, count: int) -> str:
        """Return `problem(count)`, which reads files, from a cache that is valid for a start."""
        key = self._joined, count
        if key not in self._problems:
            self._problems[key] = self.problem(count)
        return self._problems[key]

    def _train(self, group: Group) -> None:
        """Run the training process of this host until it ends, or a host of the group is lost."""
        hosts, lost_since, stop_sent = self.hosts, None, False
        starts = hosts.attempt(0, self.starts)
        hosts.beat(state="running", group=group.number, code=None)
        while not (command := hosts.attempt([], self.command)):
            time.sleep(PERIOD)
            hosts.beat()
            hosts.check()
        process = _start(command, group, hosts.host)
        try:
            while process.poll() is None:
                time.sleep(PERIOD)
                hosts.beat()
                if self._signal is not None and not stop_sent:
                    stop_sent = True
                    process.send_signal(signal.SIGTERM)
                results = zip(group.hosts, hosts.results(group), strict=True)
                ended = [host for host, code in results if code not in (None, 0, watch.STOPPED)]
                lost = hosts.lost(group) + ended
                if not lost:
                    lost_since = None
                elif lost_since is None:
                    lost_since = time.monotonic()
                elif time.monotonic() - lost_since > KILL_DELAY:
                    _log(f"process {lost[0]} is lost: stopping that of this host")
                    break
                newest = hosts.newest
                if newest and newest.number >= group.number and newest != group:
                    break  # the others took this host for lost
                if lost or stop_sent:
                    continue
                if hosts.attempt(False, self._can_grow, group, starts):
                    stop_sent = True
                    _log("more processes joined: saving a checkpoint, and starting with them")
                    process.send_signal(signal.SIGTERM)
        finally:
            process.kill()
            process.wait()
        state = "waiting" if self._signal is None else "left"
        hosts.beat(state=state, code=process.returncode)

    def _can_grow(self, group: Group, starts: int) -> bool:
        """Whether this host leads a group that could be larger, and has begun to train.

        Before that, a stop would only cost the time of the start. `starts` is their number before.
        """
        size, waiting = len(group.hosts), self.hosts.alive("waiting")
        others = [host for host in waiting if host not in group.sessions]
        if not others or self.hosts.host != group.hosts[0] or size == self.most:
            return False
        return (self._largest(size + len(others)) or 0) > size and self.starts() > starts

    def _exit_codes(self, group: Group) -> list[int | None]:
        """Wait until all hosts of a group have ended, and return `Hosts.results`."""
        hosts = self.hosts
        while missing := {host for host in group.hosts if hosts.result(group, host) is None}:
            if missing <= set(hosts.lost(group)):
                break
            time.sleep(PERIOD)
            hosts.beat()
            hosts.check()
        return hosts.results(group)

    def _outcome(self, group: Group, codes: list[int | None]) -> int | None:
        """Return the exit code after a group has ended; None to train again."""
        hosts = self.hosts
        if self._signal is not None:
            hosts.beat(state="left")
            return 0
        if _ask_for_restart(codes):
            return None
        code = max((c or 0 for c in codes if c != watch.STOPPED), default=0)
        if code == 0:  # the last step is done
            hosts.attempt(None, hosts.write_group, dataclasses.replace(group, finished=True))
        return code

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
        watch.SUPERVISED: "1",
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


def _read(file: epath.Path) -> dict[str, Any] | None:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads(file.read_text())
    return None


def _ask_for_restart(codes: list[int | None]) -> bool:
    """Whether training goes on after it ended with these exit codes; None is of a dead host.

    A host that died, or that a signal killed, explains the errors of others. After a stop before
    the last step, an error of another host is for the user to fix.
    """
    if any(code is None or code < 0 or code == watch.RETRY for code in codes):
        return True
    return watch.STOPPED in codes and set(codes) <= {0, watch.STOPPED}


def _count(hosts: int) -> str:
    return f"{hosts} {'process' if hosts == 1 else 'processes'}"


def _log(text: str) -> None:
    print(f"vlm: {text}", file=sys.stderr, flush=True)
