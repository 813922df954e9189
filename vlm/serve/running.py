"""Starting and stopping: the port, the signals, and what is answered before the end."""

import errno
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from vlm.errors import ConfigError

DRAIN_SECONDS = 30  # that requests have to end once the server is told to stop
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def bound(host: str, port: int) -> socket.socket:
    """A socket that holds the port, before minutes are spent on loading a model.

    Raises:
        ConfigError: the port is in use or not ours to take, or there is no such host.
    """
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"the port {port} is not between 0 and 65535: choose another with --port")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
        taken.listen(2048)
    except OSError as error:
        taken.close()
        if error.errno == errno.EADDRINUSE:
            why = f"the port {port} of {host} is in use: choose another with --port"
        elif error.errno == errno.EACCES:
            why = f"the port {port} needs more rights than you have: choose one from 1024 up"
        else:
            why = f"{host} is no address of this machine ({error.strerror}): choose another --host"
        raise ConfigError(why) from None
    return taken


def serve(
    app: Any,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    taken: socket.socket | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve an application until SIGTERM or Ctrl-C; what is inside by then is answered first.

    Args:
        app: what `create_app` gives; it is warmed up before the port is listened to.
        taken: the socket to listen on, from `bound`.
        ready: told the address of the page once requests are answered.

    Raises:
        ConfigError: see `bound`.

    Example:
        >>> vlm.serve.serve(vlm.serve.create_app(model))  # doctest: +SKIP
    """
    taken = taken or bound(host, port)
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{taken.getsockname()[1]}/"

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if not self.should_exit:
                ready(url)

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        server_header=False,
        lifespan="on",
    )
    # uvicorn hands a signal on once it has stopped: a server that was told to stop has not failed.
    before = {number: signal.signal(number, lambda *_: None) for number in _STOPS}
    try:
        Server(config).run(sockets=[taken])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        taken.close()


_STOPS = (signal.SIGTERM, signal.SIGINT)
