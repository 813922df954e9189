"""An HTTP server on loopback that hangs, resets, truncates, trickles or answers 503 when told."""

import http.server
import random
import socket
import struct
import threading
import time


class SickServer(http.server.ThreadingHTTPServer):
    """Serves `files` with range requests; `faults` (kind by request) and `rates` break it."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, files: dict[str, bytes], delay: float = 0.0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.delay = files, delay
        self.faults: list[str] = []  # of the next reads, in order
        self.rates: dict[str, float] = {}  # kind: share of the reads
        self.always = ""  # the fault of every read
        self.status = 200  # of every answer
        self.asked: list[str] = []  # method and path of each request
        self.reads = 0
        self.dice = random.Random(0)
        self.lock = threading.Lock()
        self.over = threading.Event()  # lets hanging requests go

    def __enter__(self) -> "SickServer":
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"
        return self

    def __exit__(self, *error) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """A client that gave up is expected."""

    def next_fault(self) -> str:
        with self.lock:
            self.reads += 1
            if self.faults:
                return self.faults.pop(0)
            draw = self.dice.random()
            for kind, rate in self.rates.items():
                if draw < rate:
                    return kind
                draw -= rate
        return self.always


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one packet for head and body
    server: SickServer

    def do_HEAD(self) -> None:
        self.server.asked.append(f"HEAD {self.path}")
        if self.server.status != 200 or self.path not in self.server.files:
            return self._head(self.server.status if self.server.status != 200 else 404, 0)
        return self._head(200, len(self.server.files[self.path]))

    def do_GET(self) -> None:
        time.sleep(self.server.delay)
        self.server.asked.append(f"GET {self.path}")
        if self.server.status != 200 or self.path not in self.server.files:
            return self._head(self.server.status if self.server.status != 200 else 404, 0)
        data = self.server.files[self.path]
        wanted = self.headers.get("Range")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            data = data[int(first) : int(last or len(data)) + 1]
        fault = self.server.next_fault()
        if fault == "503":
            self._head(503, 0)
        elif fault == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            self.connection.close()
        elif fault == "hang":
            self.server.over.wait(300)
        elif fault == "hang inside":
            self._head(206, len(data))
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.server.over.wait(300)
        elif fault == "truncate":
            self._head(206, len(data))
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif fault == "trickle":
            self._head(206, len(data))
            for place in range(len(data)):
                self.wfile.write(data[place : place + 1])
                self.wfile.flush()
                if self.server.over.wait(0.05):
                    return None
        else:
            self._head(206 if wanted else 200, len(data))
            self.wfile.write(data)
        self.wfile.flush()
        return None

    def _head(self, status: int, length: int) -> None:
        self.send_response_only(status)
        self.send_header("Content-Length", str(length))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def log_message(self, *args) -> None:
        """Log nothing."""
