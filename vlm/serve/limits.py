"""What a server takes from its clients, and how it says that something is too much."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vlm.errors import ConfigError, VlmError


@dataclass(frozen=True)
class Limits:
    """Bounds of one request and of all together; what exceeds them is refused in one sentence.

    Attributes:
        body_bytes: of a request; 16 MiB, an image of 12 MiB in base64.
        items: images and texts of a request.
        pixels: of an image before it is resized; 32 million, 96 MiB while it is decoded.
        characters: of a text.
        waiting: items of all requests that are not answered yet; more get 429.
        waiting_bytes: of all bodies that are held at once; more get 429.
        seconds: that an answer may take, and that a body may take to arrive.
        urls: whether an image may be an address that the server fetches.

    Example:
        >>> vlm.serve.Limits(items=8).items
        8
    """

    body_bytes: int = 16 << 20
    items: int = 256
    pixels: int = 32_000_000
    characters: int = 16_384
    waiting: int = 256
    waiting_bytes: int = 256 << 20
    seconds: float = 30.0
    urls: bool = False

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, bool) and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"the limit {name} is {value}: make it above 0")


class Refused(VlmError):
    """A request, or an item of one, that is not answered, with its HTTP status and a code.

    Args:
        message: one sentence with the mend.
        status: of HTTP.
        code: what programs tell it by, such as "image_too_large".
        retry_after: seconds until it may be worth asking again.
    """

    def __init__(self, message: str, status: int, code: str, retry_after: float | None = None):
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after


class Admission:
    """Counts what is inside, and lets no more in than there is room for."""

    def __init__(self, most: int, what: str):
        self._most, self._what = most, what
        self._lock = threading.Lock()
        self.inside = 0

    @contextmanager
    def room_for(self, count: int, retry_after: float = 1.0) -> Iterator[None]:
        """Room for `count` while the block runs.

        Raises:
            Refused: there is none now (429); one request alone always finds room in an empty house.
        """
        with self._lock:
            if self.inside and self.inside + count > self._most:
                raise Refused(
                    f"the server is busy: {self.inside:,} {self._what} are waiting and there is "
                    f"room for {self._most:,}; ask again in a moment",
                    429,
                    "busy",
                    retry_after,
                )
            self.inside += count
        try:
            yield
        finally:
            with self._lock:
                self.inside -= count
