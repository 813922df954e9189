"""Limits and deadlines of connections: a uvicorn protocol with a guard over all of them."""

import asyncio
import ipaddress
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vlm.serving.limits import Limits
from vlm.serving.middleware import problem

HEAD_BYTES, HEAD_LINES = 1 << 16, 256  # of the head of a request, and of the trailer of its body
SMALL_CHUNKS, CHUNK_BYTES = 256, 64  # chunks of a body that may be small, and the mean of others
PIPELINED = 16  # requests that are sent ahead of answers
REST_FACTOR = 4  # how much is read of a body whose request is answered: x the limit of bodies
WRITE_SECONDS = 30.0  # until a client has read what was sent
SWEEP_SECONDS = 1.0

Phase = Literal["head", "body", "work", "rest", "idle"]
SECONDS: dict[Phase, float] = {
    "head": 10.0,  # until the head of a request is complete
    "rest": 5.0,  # for the rest of a body whose request is answered
    "idle": 75.0,  # between requests; load balancers commonly close after 60 s
    "work": math.inf,  # the routes have their own timeout
}


class Guard:
    """Open connections of one server: their number, deadlines, and unsent bytes."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._open: dict[str, set[GuardedProtocol]] = defaultdict(set)
        self._count = 0
        self._sweeping = False

    def enter(self, connection: "GuardedProtocol") -> bool:
        """Register a connection; return False if there is no room for it.

        Over a limit, the connection that has waited longest for its client makes room.
        """
        own = self._open[connection.address]
        if len(own) >= self.limits.connections_per_address:
            room = self._evict(own)
        else:
            room = self._count < self.limits.connections or self._evict(self._all())
        self._open[connection.address].add(connection)
        self._count += 1
        if not self._sweeping:
            self._sweep(connection.loop)
        return room

    def leave(self, connection: "GuardedProtocol") -> None:
        """Forget a closed connection."""
        own = self._open[connection.address]
        if connection in own:
            own.remove(connection)
            self._count -= 1
        if not own:
            del self._open[connection.address]

    def bound_unsent(self) -> None:
        """Abort the slowest readers while all of them leave too many bytes unread."""
        slow = sorted(
            (one for one in self._all() if one.flow.write_paused), key=lambda one: one.unread_since
        )
        unsent = [one.transport.get_write_buffer_size() for one in slow]
        excess = sum(unsent) - self.limits.waiting_bytes
        for one, size in zip(slow, unsent, strict=True):
            if excess <= 0:
                return
            one.transport.abort()
            excess -= size

    def _all(self) -> Iterable["GuardedProtocol"]:
        return [one for own in self._open.values() for one in own]

    def _evict(self, connections: Iterable["GuardedProtocol"]) -> bool:
        waiting = [one for one in connections if one.phase != "work" or one.flow.write_paused]
        if not waiting:
            return False
        oldest = min(waiting, key=lambda one: one.since)
        oldest.transport.abort()
        self.leave(oldest)
        return True

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Abort the connections whose deadline has passed, each second while there are any."""
        now = loop.time()
        for one in self._all():
            if now > one.deadline():
                one.transport.abort()
        self._sweeping = bool(self._count)
        if self._sweeping:
            loop.call_later(SWEEP_SECONDS, self._sweep, loop)


class GuardedProtocol(HttpToolsProtocol):
    """HTTP/1.1 with limits on heads, chunks and pipelines, and a deadline for each phase."""

    def __init__(self, guard: Guard, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.guard = guard
        self.address = ""
        self.phase: Phase = "head"
        self.since = self.loop.time()
        self.unread_since = math.inf
        self._excess = ""  # what a request has too much of
        self._progress = False  # the parser has completed a head, a chunk or a request
        self._unparsed = 0  # bytes since then
        self._lines = self._line_bytes = self._chunks = self._body_bytes = 0

    def deadline(self) -> float:
        """Return the loop's time at which the connection is closed if nothing changes."""
        # The middleware answers a slow body by 408 before this closes it.
        seconds = SECONDS.get(self.phase, self.guard.limits.seconds + SECONDS["rest"])
        return min(self.since + seconds, self.unread_since + WRITE_SECONDS)

    def _enter(self, phase: Phase) -> None:
        self.phase, self.since = phase, self.loop.time()

    # -------------------------------------------------------------------------- the transport

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.address = _network(transport.get_extra_info("peername"))
        if not self.guard.enter(self):
            self._refuse(503, "busy", "the server has no free connection: retry later")

    def connection_lost(self, exc: Exception | None) -> None:
        self.guard.leave(self)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self.pipeline.clear()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.phase == "idle":
            self._enter("head")
        self._progress = False
        super().data_received(data)
        self._unparsed = 0 if self._progress else self._unparsed + len(data)
        if self._unparsed > HEAD_BYTES and not self.transport.is_closing():
            self._excess = f"headers of more than {HEAD_BYTES:,} bytes"
            self.send_400_response("")

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unread_since = self.loop.time()
        self.guard.bound_unsent()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.unread_since = math.inf

    # ----------------------------------------------------------------------------- the parser

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._enter("head")
        self._lines = self._line_bytes = self._chunks = self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._count_line(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_line(name + value)
        if self.phase == "head":  # a header of the trailer is none of the request
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._progress = True
        self._enter("body")
        super().on_headers_complete()
        if len(self.pipeline) > PIPELINED:
            self._stop(f"more than {PIPELINED} requests without waiting for their answers")

    def on_body(self, body: bytes) -> None:
        self._progress = True
        self._chunks += 1
        self._body_bytes += len(body)
        if self._chunks > SMALL_CHUNKS + self._body_bytes // CHUNK_BYTES:
            self._stop(f"chunks of fewer than {CHUNK_BYTES} bytes")
        if self._body_bytes > REST_FACTOR * self.guard.limits.body_bytes:
            self._stop(f"a body of more than {self.guard.limits.body_bytes:,} bytes")
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._progress = True
        self._enter("idle" if self.cycle.response_complete else "work")
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.cycle.response_complete and self.phase in ("body", "work"):  # none is pipelined
            self._enter("rest" if self.phase == "body" else "idle")
            self.cycle.body = bytearray()
        super().on_response_complete()

    def _count_line(self, line: bytes) -> None:
        self._lines += 1
        self._line_bytes += len(line)
        if self._lines > HEAD_LINES:
            self._stop(f"more than {HEAD_LINES} headers")
        if self._line_bytes > HEAD_BYTES:
            self._stop(f"headers of more than {HEAD_BYTES:,} bytes")

    def _stop(self, excess: str) -> None:
        """Make the parser fail, whose caller then calls `send_400_response`."""
        self._excess = excess
        raise ValueError(excess)

    # -------------------------------------------------------------------- refused connections

    def send_400_response(self, msg: str) -> None:
        """Answer a request that is not valid HTTP, or that has too much of something."""
        if self._excess:
            self._refuse(431, "too_much", f"the request has {self._excess}: send less")
        else:
            self._refuse(400, "invalid_http", "the request is not valid HTTP/1.1")

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Send an error and close the connection, unless a response has started."""
        if self.transport.is_closing():
            return
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            body = json.dumps({"error": problem(message, code, status)}).encode()
            head = (
                f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()


_REASONS = {400: "Bad Request", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}


def _network(peer: Any) -> str:
    """Return the IPv4 address or the IPv6 /64 network of a peer, or "" for a Unix socket."""
    if not isinstance(peer, tuple):
        return ""
    try:
        address = ipaddress.ip_address(str(peer[0]).partition("%")[0])
    except ValueError:
        return str(peer[0])
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        return str(mapped or ipaddress.ip_network((address, 64), strict=False))
    return str(address)
