"""Clients that attack a server, each until it is killed.

python tests/serving/attacks.py ATTACK PORT [KEY]
"""

import contextlib
import itertools
import json
import socket
import sys
import time

MIB = 1 << 20


def connected(port, timeout=10.0):
    return socket.create_connection(("127.0.0.1", port), timeout)


def head(path, length, key="", extra=""):
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"{authorization}{extra}Content-Length: {length}\r\n\r\n"
    ).encode()


def post(port, path, body, key=""):
    """Send one request and return the status of its answer."""
    with connected(port, 60) as client:
        with contextlib.suppress(OSError):  # the server may refuse before it has read everything
            client.sendall(head(path, len(body), key) + body)
        return client.recv(64).partition(b" ")[2][:3]


def hold(port, start, count):
    """Keep `count` connections open that have sent `start`, and reopen those that are closed."""
    clients = []
    while True:
        for client in list(clients):
            with contextlib.suppress(BlockingIOError):
                try:
                    if client.recv(65536):
                        continue
                except (ConnectionError, TimeoutError):
                    pass
                client.close()
                clients.remove(client)
        for _ in range(count - len(clients)):
            try:
                client = connected(port, 2)
                client.sendall(start)
            except OSError:
                break
            client.setblocking(False)
            clients.append(client)
        time.sleep(0.2)


def declared_bodies(port, key):
    """Declare bodies of 16 MiB without a key, and send nothing of them."""
    hold(port, head("/healthz", 16 * MIB), 48)


def bodies_without_key(port, key):
    """Send half of a large body without a key, and stop."""
    hold(port, head("/v1/embeddings", 16 * MIB) + b"A" * (8 * MIB), 24)


def stalled_bodies(port, key):
    """Send half of a large body with a valid key, and stop."""
    body = b'{"input": "data:image/png;base64,' + b"A" * (8 * MIB)
    hold(port, head("/v1/embeddings", 16 * MIB, key) + body, 24)


def endless_header(port, key):
    """Send a header that does not end."""
    while True:
        with contextlib.suppress(OSError), connected(port) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
            for _ in range(200):
                client.sendall(b"a" * MIB)


def many_headers(port, key):
    """Send short headers without end, in the head and in the trailer of a chunked body."""
    start = b"POST /healthz HTTP/1.1\r\nHost: localhost\r\n"
    for chunked in itertools.cycle((b"", b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n")):
        with contextlib.suppress(OSError), connected(port) as client:
            client.sendall(start + chunked)
            for _ in range(100):
                client.sendall(b"a:b\r\n" * 200_000)


def idle_connections(port, key):
    """Open more connections than a process may have files, and send half a request line."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    hold(port, b"GET / HT", min(hard, 1600) - 100)


def slow_headers(port, key):
    """Send a header byte by byte, on many connections."""
    clients = []
    while True:
        clients = [client for client in clients if trickled(client)]
        with contextlib.suppress(OSError):
            while len(clients) < 300:
                clients.append(connected(port, 2))
                clients[-1].sendall(b"GET / HTTP/1.1\r\nX: ")
        time.sleep(1)


def trickled(client, data=b"a"):
    """Send some bytes; return whether the connection is still open."""
    try:
        client.sendall(data)
    except OSError:
        client.close()
        return False
    return True


def tiny_chunks(port, key):
    """Send a body in chunks of one byte, without a key."""
    start = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    while True:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            clients = [stack.enter_context(connected(port, 30)) for _ in range(32)]
            for client in clients:
                client.sendall(start)
            for client in itertools.cycle(clients):
                client.sendall(b"1\r\n1\r\n" * 40_000)
        time.sleep(0.2)  # new connections cost time too, and are not the attack


def pipelined(port, key):
    """Send requests on one connection without waiting for their answers."""
    while True:
        with contextlib.suppress(OSError), connected(port, 5) as client:
            while True:
                client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5_000)


def unread_answers(port, key):
    """Ask for large answers, and read nothing of them."""
    request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 8
    hold_unread(port, request, 400)


def hold_unread(port, start, count):
    clients = []
    while True:
        for _ in range(count - len(clients)):
            with contextlib.suppress(OSError):
                client = socket.socket()
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.settimeout(2)
                client.connect(("127.0.0.1", port))
                client.sendall(start)
                clients.append(client)
                time.sleep(0.01)  # the answers cost time too, and are not the attack
        time.sleep(1)
        clients = [client for client in clients if trickled(client, b"\r\n")]


def integers(port, key):
    """Post a list of a million integers."""
    flood(port, key, "/v1/embeddings", b'{"input": [' + b"1," * (MIB // 2 - 16) + b"1]}")


def empty_values(port, key):
    """Post lists of millions of empty lists, objects and texts."""
    pieces = (b"[]", b"{}", b'""', b'{"":0}', b"[[]]")
    bodies = [
        b'{"input": [' + b",".join([piece] * (15 * MIB // (len(piece) + 1))) + b"]}"
        for piece in pieces
    ]
    flood(port, key, "/v1/embeddings", *bodies)


def escapes(port, key):
    """Post a text of 16 MiB of escaped characters, and one whose string does not end."""
    text = b'{"input": "' + b"\\ud83d\\ude00" * (15 * MIB // 12)
    flood(port, key, "/v1/embeddings", text + b'"}', b'{"input": "' + b'\\"' * (7 * MIB))


def templates(port, key):
    """Post templates that each hold the label thousands of times."""
    body = {"images": [0], "labels": ["a" * 1600 + str(i) for i in range(40)]}
    body["templates"] = ["{}" * 6000] * 100
    flood(port, key, "/v1/classify", json.dumps(body).encode())


def long_texts(port, key):
    """Post as many texts as possible, each as long as possible."""
    texts = ["naïve " * 2700 + str(i) for i in range(256)]
    flood(port, key, "/v1/embeddings", json.dumps({"input": texts}).encode())


def flood(port, key, path, *bodies):
    """Post the bodies in turn, the next one after the answer to the last."""
    for body in itertools.cycle(bodies):
        try:
            status = post(port, path, body, key)
        except OSError:
            status = b"000"
        if status == b"429":
            time.sleep(0.2)


def slow_urls(port, key):
    """Post URLs of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as silent:
        urls = [f"http://127.0.0.1:{silent.getsockname()[1]}/{i}.png" for i in range(256)]
        body = json.dumps({"input": [{"image": url} for url in urls]}).encode()
        flood(port, key, "/v1/embeddings", body)


ATTACKS = {
    function.__name__: function
    for function in (
        declared_bodies, bodies_without_key, stalled_bodies, endless_header, many_headers,
        idle_connections, slow_headers, tiny_chunks, pipelined, unread_answers, integers,
        empty_values, escapes, templates, long_texts, slow_urls,
    )
}  # fmt: skip

if __name__ == "__main__":
    name, port, *key = sys.argv[1:]
    ATTACKS[name](int(port), key[0] if key else "")
