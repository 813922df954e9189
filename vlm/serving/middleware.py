"""ASGI middleware: authentication, host and origin check, bodies, headers, metrics, log."""

import asyncio
import contextlib
import hashlib
import hmac
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlm.serving.bodies import BodyMemory, Held, check_values, too_large
from vlm.serving.limits import Limits, RequestError
from vlm.serving.metrics import Metrics
from vlm.serving.request_log import log_request

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
# Routes without a key: the page, health and metrics hold no user data.
PUBLIC, PUBLIC_FOLDER = ("/", "/healthz", "/metrics", "/openapi.json"), "/static/"
DRAIN_FACTOR, DRAIN_SECONDS = 4, 5  # how much of a rejected body is read: x limit, and seconds
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


class ServerMiddleware:
    """ASGI middleware around all routes.

    Args:
        keys: API keys. All routes but the public ones require one as `Authorization: Bearer KEY`;
            empty: no key needed.
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
        self._memory = BodyMemory(limits)

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

        held = Held(self._memory)
        try:
            with held:
                await self._checked(scope, receive, send_with_headers, held)
        except RequestError as error:
            if status:  # the response has started
                raise
            scope["vlm.error"] = error.code
            self.metrics.refused.labels(error.code).inc()
            await error_response(error)(scope, receive, send_with_headers)
        except Exception:
            status = status or 500
            raise
        finally:
            route = scope.get("route")
            path = getattr(route, "path", None) or "other"
            seconds = time.perf_counter() - start
            self.metrics.waiting_bytes.set(self._memory.in_flight)
            self.metrics.answer(path, status or 499, seconds)
            log_request(scope, status or 499, seconds, held.size, scope.get("vlm.error"))

    async def _checked(self, scope: Scope, receive: Receive, send: Send, held: Held) -> None:
        """Call the application if the request may be answered; its body has then arrived."""
        headers = dict(scope["headers"])
        takes_body = scope["method"] == "POST" and not _is_public(scope)
        declared = headers.get(b"content-length", b"0")
        try:
            self._check_host(headers)
            _check_origin(scope, headers)
            self._check_key(scope, headers)
            if takes_body:
                _check_content_type(headers)
                if declared.isdigit() and int(declared) > self.limits.body_bytes:
                    raise too_large(self.limits)
            body = await held.receive(receive) if takes_body else b""
        except RequestError as error:
            if takes_body and error.status != 408 and b"expect" not in headers:
                await self._drain(receive)
            raise
        if body is None:  # the client disconnected
            return
        # No answer has parts, and old versions of Starlette read a long Range in quadratic time.
        scope["headers"] = [pair for pair in scope["headers"] if pair[0] != b"range"]
        self.metrics.waiting_bytes.set(self._memory.in_flight)
        check_values(body, self.limits.values)
        sent = False

        async def receive_body() -> Message:
            nonlocal sent, body
            if sent:
                return await receive()  # waits for the disconnect
            sent, content, body = True, body, b""
            return {"type": "http.request", "body": content, "more_body": False}

        await self.app(scope, receive_body, send)

    async def _drain(self, receive: Receive) -> None:
        """Read part of a rejected body: many clients read no response before they have sent it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                size, more = 0, True
                while more and size < DRAIN_FACTOR * self.limits.body_bytes:
                    message = await receive()
                    size += len(message.get("body", b""))
                    more = message.get("more_body", False)

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
        if not self._keys or _is_public(scope):
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


def _is_public(scope: Scope) -> bool:
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return path in PUBLIC or path.startswith(PUBLIC_FOLDER)


def _check_origin(scope: Scope, headers: dict[bytes, bytes]) -> None:
    """Reject requests that web pages of other origins make, before anything is computed.

    A browser sends Sec-Fetch-Site to trustworthy addresses, and Origin with every POST. Other
    clients send neither. Without Sec-Fetch-Site the hosts are compared, as in Go's
    `http.CrossOriginProtection`.
    """
    if scope["method"] in ("GET", "HEAD", "OPTIONS"):
        return
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if site is not None:
        same = site in (b"same-origin", b"none")
    else:
        same = origin is None or _host_of(origin) == headers.get(b"host", b"").lower()
    if not same:
        raise RequestError(
            "the request comes from a web page of another origin: send it from a server, or from "
            "the page of this one",
            403,
            "cross_origin",
        )


def _host_of(origin: bytes) -> bytes | None:
    try:
        return urlsplit(origin.decode("latin-1")).netloc.lower().encode("latin-1") or None
    except ValueError:
        return None


def _check_content_type(headers: dict[bytes, bytes]) -> None:
    """Reject other types than JSON, which a web page may post without asking the server first."""
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    is_json = kind == b"application/json" or (
        kind.startswith(b"application/") and kind.endswith(b"+json")
    )
    if not is_json:
        raise RequestError(
            f"the content type is {kind.decode('latin-1')[:80]!r}: send JSON with the header "
            "Content-Type: application/json",
            415,
            "unsupported_media_type",
        )


def problem(message: str, code: str, status: int, param: str | None = None) -> dict[str, Any]:
    """Return an error object in the format of the OpenAI API."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, kind)
    return {"message": message, "type": kind, "code": code, "param": param}


def error_response(error: RequestError) -> JSONResponse:
    """Return the response to a rejected request, in the format of the OpenAI API."""
    headers = {"Connection": "close"} if error.status in (408, 413) else {}
    if error.status == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    elif error.retry_after is not None:
        headers = {"Retry-After": str(max(1, round(error.retry_after)))}
    content = problem(str(error), error.code, error.status, error.param)
    return JSONResponse({"error": content}, error.status, headers)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
