"""Request limits, admission control, and the error of a rejected request."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vlm.errors import ConfigError, VlmError


@dataclass(frozen=True)
class Limits:
    """Limits per request and for all requests in flight; a request over a limit gets a 4xx error.

    Attributes:
        body_bytes: maximum size of a request body; 16 MiB holds an image of 12 MiB in base64.
        items: maximum number of images and texts of a request.
        pixels: maximum size of an image before resizing. Decoding one takes at most 8 bytes of
            memory for each of these pixels, and 96 MiB: 341 MiB for 32 million.
        characters: maximum length of a text, and of a template that is filled in.
        waiting: maximum number of unanswered items over all requests; further requests get 429. A
            request counts for at most half of it, so that one large request leaves room for others.
        waiting_bytes: maximum size of all request bodies and fetched images in memory; further
            requests get 429. Bodies under 64 KiB are not counted.
        seconds: timeout for an answer, and for the arrival of a body.
        urls: whether images may be http(s) URLs, which the server fetches from public addresses.
        connections: maximum number of open connections, half of them from one address. Over the
            limit, the connection that has waited longest for its client is closed.
        request_characters: maximum length of all texts of a request together.

    Example:
        >>> vlm.serving.Limits(items=8).items
        8
    """

    body_bytes: int = 16 << 20
    items: int = 256
    pixels: int = 32_000_000
    characters: int = 16_384
    waiting: int = 256
    waiting_bytes: int = 64 << 20
    seconds: float = 30.0
    urls: bool = False
    connections: int = 1024
    request_characters: int = 1 << 20

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, bool) and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"the limit {name} is {value}: it must be finite and above 0")

    @property
    def connections_per_address(self) -> int:
        """Maximum number of open connections of one IPv4 address or IPv6 /64 network."""
        return max(1, self.connections // 2)

    @property
    def values(self) -> int:
        """Maximum number of JSON values of a body, far above that of a valid request."""
        return 16 * self.items + 8192


class RequestError(VlmError):
    """Rejection of a request, or of one of its items, with an HTTP status and an error code.

    Args:
        message: one sentence that names the fix.
        status: the HTTP status.
        code: machine-readable error code, such as "image_too_large".
        retry_after: seconds after which the client should retry.
        param: the field of the request, such as "input[0]".
    """

    def __init__(
        self,
        message: str,
        status: int,
        code: str,
        retry_after: float | None = None,
        param: str | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after
        self.param = param


def busy(reason: str, retry_after: float) -> RequestError:
    """Return the error of a request that the server has no room for now (429)."""
    return RequestError(f"the server is busy: {reason}; retry later", 429, "busy", retry_after)


class Admission:
    """Counter of items or bytes in flight, with an upper limit."""

    def __init__(self, limit: int, unit: str):
        self._limit, self._unit = limit, unit
        self._lock = threading.Lock()
        self.in_flight = 0

    @contextmanager
    def admit(self, count: int, retry_after: float = 1.0) -> Iterator[None]:
        """Count `count` as in flight while the block runs.

        Raises:
            RequestError: over the limit (429). A single request is always admitted when the server
                is idle.
        """
        count = min(count, max(1, self._limit // 2))
        with self._lock:
            if self.in_flight and self.in_flight + count > self._limit:
                in_flight = f"{self.in_flight:,} {self._unit} are in flight"
                raise busy(f"{in_flight}, and the limit is {self._limit:,}", retry_after)
            self.in_flight += count
        try:
            yield
        finally:
            with self._lock:
                self.in_flight -= count
