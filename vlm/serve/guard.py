"""What stands before every route: keys, hosts, bytes, times, headers, and the count of it all."""

import asyncio
import contextlib
import hashlib
import hmac
import json
import time
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlm.serve.limits import Admission, Limits, Refused
from vlm.serve.metrics import Metrics

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
]
GUARDED = "/v1/"  # what needs a key; the page, health and metrics hold nobody's data
LET_PASS, LET_PASS_SECONDS = 4, 5  # of a body that is too large: times the limit, and how long
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


class Guard:
    """ASGI middleware around all routes.

    Args:
        keys: one of which `/v1/` asks for as `Authorization: Bearer KEY`; none: open to all.
        local: answer only to the names of this machine, so that a web page elsewhere cannot reach
            a server without keys by giving its own name this machine's address.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        metrics: Metrics,
        keys: Sequence[str] = (),
        local: bool = False,
    ):
        self.app, self.limits, self.metrics, self.local = app, limits, metrics, local
        self._keys = [_digest(key.encode()) for key in keys]
        self._bytes = Admission(limits.waiting_bytes, "bytes")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        try:
            await self._guarded(scope, receive, send_with_headers)
        except Refused as refused:
            if status:  # it has begun to answer
                raise
            self.metrics.refused.labels(refused.code).inc()
            await _answer(refused, send_with_headers)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", None) or "other"
            self.metrics.answer(path, status or 499, time.perf_counter() - start)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        self._check_host(headers)
        self._check_key(scope, headers)
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.limits.body_bytes:
            await self._let_pass(receive)
            raise self._too_large()
        # Without a length the most that there may be is reserved.
        most = int(declared) if declared.isdigit() else self.limits.body_bytes
        if b"transfer-encoding" in headers:
            most = self.limits.body_bytes
        with self._bytes.room_for(most):
            self.metrics.waiting_bytes.set(self._bytes.inside)
            try:
                async with asyncio.timeout(self.limits.seconds):
                    body = await self._body(receive)
            except TimeoutError:
                raise Refused(
                    f"the body took over {self.limits.seconds:g} s to arrive: send it faster",
                    408,
                    "slow_body",
                ) from None
            if body is None:  # the client left
                return
            sent = False

            async def receive_body() -> Message:
                nonlocal sent, body
                if sent:
                    return await receive()  # waits until the client leaves
                sent, held, body = True, body, b""
                return {"type": "http.request", "body": held, "more_body": False}

            await self.app(scope, receive_body, send)
        self.metrics.waiting_bytes.set(self._bytes.inside)

    async def _body(self, receive: Receive) -> bytes | None:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > self.limits.body_bytes:
                await self._let_pass(receive)
                raise self._too_large()
            parts.append(part)
            if not message.get("more_body"):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _let_pass(self, receive: Receive) -> None:
        """Take some of a refused body: many clients read no answer before they have sent."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LET_PASS_SECONDS):
                size, more = 0, True
                while more and size < LET_PASS * self.limits.body_bytes:
                    message = await receive()
                    size += len(message.get("body", b""))
                    more = message.get("more_body", False)

    def _too_large(self) -> Refused:
        return Refused(
            f"the body is over {self.limits.body_bytes:,} bytes: send fewer or smaller images",
            413,
            "body_too_large",
        )

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        if not self.local:
            return
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name not in LOCAL_HOSTS:
            raise Refused(
                "this server answers to localhost alone: start it with --api-key to reach it by "
                "another name",
                400,
                "unknown_host",
            )

    def _check_key(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if not self._keys or not scope["path"].startswith(GUARDED):
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        digest = _digest(given.strip())
        # All are compared, each in constant time, so that the time tells nothing.
        matches = [hmac.compare_digest(digest, key) for key in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise Refused(
                "this server asks for an API key: send it as Authorization: Bearer KEY",
                401,
                "invalid_api_key",
            )


def problem(message: str, code: str, status: int, param: str | None = None) -> dict[str, Any]:
    """What an answer says of an error, in the form that OpenAI's clients read."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, kind)
    return {"message": message, "type": kind, "code": code, "param": param}


async def _answer(refused: Refused, send: Send) -> None:
    body = json.dumps({"error": problem(str(refused), refused.code, refused.status)}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *[(key.lower().encode(), value.encode()) for key, value in extra_headers(refused).items()],
    ]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def extra_headers(refused: Refused) -> dict[str, str]:
    """The headers that go with a refusal."""
    if refused.status == 401:
        return {"WWW-Authenticate": "Bearer"}
    if refused.retry_after is not None:
        return {"Retry-After": str(max(1, round(refused.retry_after)))}
    return {"Connection": "close"} if refused.status in (408, 413) else {}


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
