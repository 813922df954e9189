"""Run the server: bind the port, handle signals, and shut down gracefully."""

import contextlib
import errno
import functools
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from vlm.errors import ConfigError
from vlm.serving.connections import SECONDS, Guard, GuardedProtocol
from vlm.serving.limits import Limits

SHUTDOWN_SECONDS = 30  # time for in-flight requests after a stop signal
OTHER_FILES = 512  # open files that are not connections
BACKLOG = 512  # connections that are accepted at once
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
    try:
        server.run(sockets=[taken])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        taken.close()


def uvicorn_config(app: Any) -> uvicorn.Config:
    """Return uvicorn's configuration for an application of `create_app`, with guarded connections.

    The process may open as many files as the limit on connections needs.
    """
    service = getattr(getattr(app, "state", None), "service", None)
    limits = Limits() if service is None else service.limits
    _allow_files(limits.connections + BACKLOG)
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


def _allow_files(count: int) -> None:
    """Raise the soft limit on open files, where the system lets us."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = count + OTHER_FILES
        if soft != resource.RLIM_INFINITY and soft < needed:
            limit = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
