"""Request bodies: memory that is counted as bytes arrive, and a bound on their JSON values."""

import asyncio
import time
from contextvars import ContextVar

from starlette.types import Receive

from vlm.serving.limits import Limits, RequestError, busy

UNCOUNTED = 1 << 16  # bytes of each body; the number of connections bounds their sum
STALLED_SECONDS = 2.0  # without a byte, after which a body makes room for others


class BodyMemory:
    """Bytes of bodies and fetched images in memory, over all requests of a server."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.in_flight = 0
        self.arriving: set[Held] = set()

    def make_room(self, count: int, held: "Held") -> None:
        """Make room for bytes of a body, if need be by dropping bodies that have stalled.

        Raises:
            RequestError: there is no room (429). A single request always finds room.
        """
        now = time.monotonic()
        stalled = [one for one in self.arriving if now - one.last_byte > STALLED_SECONDS]
        stalled.sort(key=lambda one: one.last_byte, reverse=True)
        while self.in_flight > held.counted and self.in_flight + count > self.limits.waiting_bytes:
            if not stalled:
                in_flight = f"{self.in_flight:,} bytes of requests are in flight"
                raise busy(f"{in_flight}, and the limit is {self.limits.waiting_bytes:,}", 1.0)
            stalled.pop().drop()


class Held:
    """Bytes that one request holds, until the end of a `with` block."""

    def __init__(self, memory: BodyMemory):
        self._memory = memory
        self.size = self.counted = 0
        self.last_byte = time.monotonic()
        self._timeout: asyncio.Timeout | None = None

    def add(self, count: int) -> None:
        """Count bytes that have arrived.

        Raises:
            RequestError: there is no room for them (429).
        """
        self.size += count
        self.last_byte = time.monotonic()
        if (more := max(0, self.size - UNCOUNTED) - self.counted) > 0:
            self._memory.make_room(more, self)
            self._memory.in_flight += more
            self.counted += more

    def drop(self) -> None:
        """Give the memory of a stalled body to others, and end its request."""
        self.free()
        if self._timeout is not None:
            self._timeout.reschedule(asyncio.get_running_loop().time())

    async def receive(self, receive: Receive) -> bytes | None:
        """Return the body of the request, or None if the client disconnects.

        Raises:
            RequestError: the body is too large (413), too slow (408), or there is no room (429).
        """
        limits = self._memory.limits
        parts: list[bytes] = []
        self._memory.arriving.add(self)
        try:
            async with asyncio.timeout(limits.seconds) as self._timeout:
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    more = message.get("more_body", False)
                    if self.size + len(parts[-1]) > limits.body_bytes:
                        raise too_large(limits)
                    self.add(len(parts[-1]))
        except RequestError:
            parts.clear()  # the error's traceback would keep them
            self.free()
            raise
        except TimeoutError:
            parts.clear()
            raise RequestError(
                f"the body did not arrive within {limits.seconds:g} s, or it stalled while the "
                "server was busy: send a smaller one",
                408,
                "slow_body",
            ) from None
        finally:
            self._memory.arriving.discard(self)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def free(self) -> None:
        """Stop counting the bytes so far."""
        self._memory.in_flight -= self.counted
        self.counted = 0

    def __enter__(self) -> "Held":
        self._token = HELD.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        HELD.reset(self._token)
        self.free()


HELD: ContextVar[Held] = ContextVar("held")  # of the present request


def too_large(limits: Limits) -> RequestError:
    """Return the error of a body over the limit."""
    return RequestError(
        f"the body exceeds {limits.body_bytes:,} bytes: send fewer or smaller images",
        413,
        "body_too_large",
    )


def check_values(body: bytes, limit: int) -> None:
    """Bound the number of JSON values of a body before it is parsed, in linear time.

    Parsing and validating take time and memory in proportion to that number: a body of 1 MiB can
    hold half a million integers.

    Raises:
        RequestError: more values than the limit (413).
    """
    if _separators(body) <= limit:  # at most; texts may hold separators, too
        return
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    quotes = unescaped.count(b'"')
    if quotes > 4 * limit or _separators(b"".join(unescaped.split(b'"')[::2])) > limit:
        raise RequestError(
            f"the body has more than {limit:,} JSON values: split the request",
            413,
            "too_many_items",
        )


def _separators(text: bytes) -> int:
    return text.count(b",") + text.count(b"[") + text.count(b"{")
