"""ASGI middleware: authentication, host check, body limits, security headers, metrics."""

import asyncio
import contextlib
import hashlib
import hmac
import time
from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlm.serving.limits import Admission, Limits, RequestError
from vlm.serving.metrics import Metrics

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
KEY_PREFIX = "/v1/"  # routes that need a key; the page, health and metrics hold no user data
DRAIN_FACTOR, DRAIN_SECONDS = 4, 5  # how much of an oversized body is read: x limit, and seconds
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


class ServerMiddleware:
    """ASGI middleware around all routes.

    Args:
        keys: API keys. `/v1/` requires one as `Authorization: Bearer KEY`; empty: no key needed.
        local: accept only loopback names in the Host header. This protects a server without keys
            from DNS rebinding by web pages.
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
            await self._checked(scope, receive, send_with_headers)
        except RequestError as error:
            if status:  # the response has started
                raise
            self.metrics.refused.labels(error.code).inc()
            await error_response(error)(scope, receive, send_with_headers)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", None) or "other"
            self.metrics.answer(path, status or 499, time.perf_counter() - start)

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        self._check_host(headers)
        self._check_key(scope, headers)
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.limits.body_bytes:
            await self._drain(receive)
            raise self._too_large()
        # Without a content length, reserve the maximum.
        reserved = int(declared) if declared.isdigit() else self.limits.body_bytes
        if b"transfer-encoding" in headers:
            reserved = self.limits.body_bytes
        with self._bytes.admit(reserved):
            self.metrics.waiting_bytes.set(self._bytes.in_flight)
            try:
                async with asyncio.timeout(self.limits.seconds):
                    body = await self._body(receive)
            except TimeoutError:
                raise RequestError(
                    f"the body did not arrive within {self.limits.seconds:g} s: send a smaller one",
                    408,
                    "slow_body",
                ) from None
            if body is None:  # the client disconnected
                return
            sent = False

            async def receive_body() -> Message:
                nonlocal sent, body
                if sent:
                    return await receive()  # waits for the disconnect
                sent, content, body = True, body, b""
                return {"type": "http.request", "body": content, "more_body": False}

            await self.app(scope, receive_body, send)
        self.metrics.waiting_bytes.set(self._bytes.in_flight)

    async def _body(self, receive: Receive) -> bytes | None:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > self.limits.body_bytes:
                await self._drain(receive)
                raise self._too_large()
            parts.append(part)
            if not message.get("more_body"):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _drain(self, receive: Receive) -> None:
        """Read part of a rejected body: many clients read no response before they have sent it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                size, more = 0, True
                while more and size < DRAIN_FACTOR * self.limits.body_bytes:
                    message = await receive()
                    size += len(message.get("body", b""))
                    more = message.get("more_body", False)

    def _too_large(self) -> RequestError:
        return RequestError(
            f"the body exceeds {self.limits.body_bytes:,} bytes: send fewer or smaller images",
            413,
            "body_too_large",
        )

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        if not self.local:
            return
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name not in LOCAL_HOSTS:
            raise RequestError(
                "this server accepts only localhost as its host name: start it with --api-key to "
                "reach it by another name",
                400,
                "unknown_host",
            )

    def _check_key(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if not self._keys or not scope["path"].startswith(KEY_PREFIX):
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        digest = _digest(given.strip())
        # Compare all keys in constant time, against timing attacks.
        matches = [hmac.compare_digest(digest, key) for key in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise RequestError(
                "the API key is missing or wrong: send it as Authorization: Bearer KEY",
                401,
                "invalid_api_key",
            )


def problem(message: str, code: str, status: int, param: str | None = None) -> dict[str, Any]:
    """Return an error object in the format of the OpenAI API."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, kind)
    return {"message": message, "type": kind, "code": code, "param": param}


def error_response(error: RequestError, param: str | None = None) -> JSONResponse:
    """Return the response to a rejected request, in the format of the OpenAI API."""
    headers = {"Connection": "close"} if error.status in (408, 413) else {}
    if error.status == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    elif error.retry_after is not None:
        headers = {"Retry-After": str(max(1, round(error.retry_after)))}
    content = problem(str(error), error.code, error.status, param)
    return JSONResponse({"error": content}, error.status, headers)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
