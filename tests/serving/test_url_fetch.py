"""Downloads of images: public addresses only, and bounds on redirects, bytes, time and number."""

import asyncio
import contextlib
import http.server
import socket
import threading
import time
import urllib.parse

import pytest
from serving import drawn, encoded, running

from vlm.serving import url_fetch
from vlm.serving.limits import Limits, RequestError
from vlm.serving.url_fetch import Fetcher, is_public

PICTURE = encoded(drawn(1))


class Handler(http.server.BaseHTTPRequestHandler):
    """Image server whose paths say what to answer."""

    def do_GET(self):
        self.server.hits.append(self.path)
        kind, _, rest = urllib.parse.unquote(self.path[1:]).partition("/")
        if kind == "to":
            self.send_response(302)
            self.send_header("Location", rest.replace("|", "/"))
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif kind == "loop":
            self.send_response(307)
            self.send_header("Location", f"/loop/{int(rest or 0) + 1}")
            self.end_headers()
        elif kind == "missing":
            self.send_error(404)
        elif kind == "headers":
            self.send_response(200)
            with contextlib.suppress(OSError):
                for number in range(100_000):
                    self.send_header(f"X-{number}", "a" * 100)
                    self.flush_headers()
        else:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                if kind == "drip":
                    while True:
                        self.wfile.write(b"a")
                        time.sleep(0.05)
                elif kind == "endless":
                    while True:
                        self.wfile.write(b"a" * 65536)
                else:
                    self.wfile.write(PICTURE)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def images():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.hits = True, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def loopback(images, monkeypatch):
    """Treat 127.0.0.1 as public, and the port of the image server as that of http."""
    monkeypatch.setattr(url_fetch, "is_public", lambda address: address == "127.0.0.1")
    monkeypatch.setitem(url_fetch.PORTS, "http", images.server_port)
    return "http://127.0.0.1"


def fetched(*urls, **limits):
    async def fetch():
        fetcher = Fetcher(Limits(urls=True, **limits))
        try:
            return list((await fetcher.fetch_all({str(i): u for i, u in enumerate(urls)})).values())
        finally:
            fetcher.close()

    return asyncio.run(fetch())


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),  # metadata of clouds
        ("168.63.129.16", False),
        ("100.64.0.1", False),
        ("192.0.0.192", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", False),
        ("::7f00:1", False),
        ("64:ff9b::a00:1", False),
        ("2002:7f00:1::", False),
        ("2001:0:53aa:64c::1", False),
        ("fe80::1%eth0", False),
        ("fd00:ec2::254", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("2001:db8::1", False),
        ("nonsense", False),
    ],
)
def test_only_addresses_of_the_public_internet_are_allowed(address, public):
    assert is_public(address) == public


def test_images_are_downloaded_and_redirects_followed(loopback, images):
    urls = [f"{loopback}/a b.png?x=1&y=ü", f"{loopback}/to/|to||b.png", f"{loopback}/missing/a"]
    first, second, missing = fetched(*urls)
    assert first == second == PICTURE
    assert isinstance(missing, RequestError)
    assert "/a%20b.png?x=1&y=%C3%BC" in images.hits


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://localhost/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://user@127.0.0.1/",
        "http://example.invalid/",
        "http://",
        "http://[/",
        "http://a\nb/",
        "http://127.0.0.1:99999/",
        f"http://{'a' * 100}.example/",
    ],
)
def test_other_addresses_are_refused_with_one_message(url, images):
    images.hits.clear()
    (error,) = fetched(url)
    assert isinstance(error, RequestError)
    assert (error.status, error.code) == (400, "url_not_fetched")
    assert str(error).startswith("0 could not be downloaded: check that its URL is public")
    assert images.hits == []


def test_open_and_closed_ports_have_the_same_answer(images, monkeypatch):
    monkeypatch.setattr(url_fetch, "is_public", lambda address: address == "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = free.getsockname()[1]
    urls = [f"http://127.0.0.1:{port}/missing/a" for port in (images.server_port, closed)]
    assert len({str(error)[1:] for error in fetched(*urls)}) == 1
    for port in (images.server_port, closed):
        monkeypatch.setitem(url_fetch.PORTS, "http", port)
        urls.append(str(fetched(urls[0])[0]))
    assert urls[2] == urls[3]


@pytest.mark.parametrize(
    "target", ["http:||localhost|x", "ftp:||127.0.0.1|x", "file:|||etc|passwd"]
)
def test_each_redirect_is_checked(loopback, images, monkeypatch, target):
    checked = []
    monkeypatch.setattr(
        url_fetch, "is_public", lambda address: checked.append(address) or len(checked) == 1
    )
    (error,) = fetched(f"{loopback}/to/{target}")
    assert isinstance(error, RequestError)
    assert images.hits[-1].startswith("/to/")


@pytest.mark.parametrize("path", ["loop/0", "endless", "headers/a", "drip"])
def test_redirects_bytes_headers_and_time_are_bounded(loopback, images, monkeypatch, path):
    monkeypatch.setattr(url_fetch, "SECONDS", 1.0)
    images.hits.clear()
    start = time.monotonic()
    (error,) = fetched(f"{loopback}/{path}", body_bytes=1 << 20)
    assert isinstance(error, RequestError)
    assert time.monotonic() - start < 5
    assert len(images.hits) <= url_fetch.REDIRECTS + 1


def test_all_images_of_a_request_share_the_limit_of_its_body(loopback):
    found = fetched(*[f"{loopback}/{i}.png" for i in range(4)], body_bytes=2 * len(PICTURE) + 1)
    assert sorted(isinstance(one, bytes) for one in found) == [False, False, True, True]


def test_a_name_is_resolved_once(loopback, monkeypatch):
    answers = iter(["127.0.0.1", "10.0.0.1"])
    asked = []

    def resolve(host, port, **_):
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    monkeypatch.setattr(url_fetch.socket, "getaddrinfo", resolve)
    assert fetched("http://rebinding.example/a.png") == [PICTURE]
    assert asked == ["rebinding.example"]


@pytest.mark.slow
def test_requests_with_urls(loopback, bundle):
    with running(bundle, limits=Limits(urls=True), index=None) as server:
        items = [{"image": f"{loopback}/a.png"}, {"image": f"{loopback}/missing/"}, "a text"]
        data = server.ask("/v1/embeddings", {"input": items}).json["data"]
        assert [item["object"] for item in data] == ["embedding", "error", "embedding"]
        error = data[1]["error"]
        assert (error["code"], error["param"]) == ("url_not_fetched", "input[1]")
        assert error["message"].startswith("item 1 could not be downloaded")
        body = {"images": [f"{loopback}/a.png"], "labels": ["a", "b"]}
        assert server.ask("/v1/classify", body).json["data"][0]["object"] == "classification"
        body = {"image": f"{loopback}/a.png", "text": "a"}
        assert server.ask("/v1/explain", body).status == 200
        reply = server.ask("/v1/explain", body | {"image": "http://10.0.0.1/"})
        assert reply.json["error"]["param"] == "image"


@pytest.mark.slow
def test_slow_urls_do_not_stop_texts(bundle, monkeypatch):
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        running(bundle, limits=Limits(urls=True, waiting=4)) as server,
    ):
        monkeypatch.setattr(url_fetch, "is_public", lambda address: address == "127.0.0.1")
        monkeypatch.setitem(url_fetch.PORTS, "http", silent.getsockname()[1])
        monkeypatch.setattr(url_fetch, "SECONDS", 3.0)
        body = {"input": [{"image": f"http://127.0.0.1/{i}"} for i in range(100)]}
        attackers = [
            threading.Thread(target=server.ask, args=("/v1/embeddings", body)) for _ in range(3)
        ]
        for thread in attackers:
            thread.start()
        time.sleep(0.5)
        answers = [server.ask("/v1/embeddings", {"input": f"text {i}"}) for i in range(5)]
        assert [answer.status for answer in answers] == [200] * 5
        assert all(thread.is_alive() for thread in attackers)
        for thread in attackers:
            thread.join()
