"""Run the server: bind the port, handle signals, and shut down gracefully."""

import contextlib
import dataclasses
import errno
import functools
import gc
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from vlm.errors import ConfigError
from vlm.serving.connections import SECONDS, Guard, GuardedProtocol
from vlm.serving.limits import Limits

SHUTDOWN_SECONDS = 30  # time for in-flight requests after a stop signal
BACKLOG = 256  # connections that are accepted at once, before any is closed
OTHER_FILES = 128 + BACKLOG  # open files apart from the connections of `Limits`
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def bind(host: str, port: int) -> socket.socket:
    """Bind a listening socket, before the model is loaded.

    Raises:
        ConfigError: the port is in use or privileged, or the host is not a local address.
    """
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"the port {port} is not between 0 and 65535: choose another with --port")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            message = f"the port {port} of {host} is in use: choose another with --port"
        elif error.errno == errno.EACCES:
            message = f"the port {port} needs root privileges: choose a --port from 1024 up"
        else:
            message = (
                f"{host} is no address of this machine ({error.strerror}): choose another --host"
            )
        raise ConfigError(message) from None
    return listener


def serve(
    app: Any,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    taken: socket.socket | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve an application until SIGTERM, SIGHUP or Ctrl-C; in-flight requests are finished first.

    Args:
        app: an application from `create_app`.
        taken: a listening socket from `bind`; None binds `host` and `port`.
        ready: callback with the URL of the page, once the server answers requests.

    Raises:
        ConfigError: see `bind`.

    Example:
        >>> vlm.serving.serve(vlm.serving.create_app(model))  # doctest: +SKIP
    """
    taken = taken or bind(host, port)
    url_host = f"[{host}]" if ":" in host else host
    url = f"http://{url_host}:{taken.getsockname()[1]}/"

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if not self.should_exit:
                ready(url)

    config = uvicorn_config(app)
    # uvicorn re-raises the signal once it has stopped. Ignore it: the shutdown was requested.
    previous = {number: signal.signal(number, lambda *_: None) for number in _STOP_SIGNALS}
    server = Server(config)

    def hang_up(*_: Any) -> None:  # the terminal or ssh session has closed
        server.should_exit = True

    number = getattr(signal, "SIGHUP", None)  # Windows has none; nohup ignores it
    if number is not None and signal.getsignal(number) != signal.SIG_IGN:
        previous[number] = signal.signal(number, hang_up)
    freeze_objects()
    try:
        server.run(sockets=[taken])
    finally:
        gc.unfreeze()
        for number, handler in previous.items():
            signal.signal(number, handler)
        taken.close()


def freeze_objects() -> None:
    """Exempt all objects that are in use now from garbage collections.

    A collection would walk all of JAX and of the application, 0.1 s each time, while no request is
    answered.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def uvicorn_config(app: Any) -> uvicorn.Config:
    """Return uvicorn's configuration for an application of `create_app`, with guarded connections.

    The soft limit on open files is raised as far as needed. Where the hard limit is lower, there
    are fewer connections.
    """
    service = getattr(getattr(app, "state", None), "service", None)
    limits = Limits() if service is None else service.limits
    files = _allow_files(limits.connections + OTHER_FILES)
    connections = max(1, min(limits.connections, files - OTHER_FILES))
    limits = dataclasses.replace(limits, connections=connections)
    return uvicorn.Config(
        app,
        http=functools.partial(GuardedProtocol, Guard(limits)),  # pyright: ignore[reportArgumentType]
        ws="none",
        log_level="error",  # a client could fill the log with warnings
        access_log=False,
        timeout_keep_alive=int(SECONDS["idle"]),
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        backlog=BACKLOG,
        server_header=False,
        lifespan="on",
    )


def _allow_files(count: int) -> int:
    """Let the process open `count` files, or as many as the system allows, and return how many."""
    try:
        import resource
    except ImportError:  # Windows has no such limit on sockets
        return count
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, most = (count if n == resource.RLIM_INFINITY else min(n, count) for n in (soft, hard))
    if soft < most:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            return most
    return soft


_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
