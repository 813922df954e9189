"""Limits, timeouts, API keys and host names."""

import http.client
import io
import socket
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from serving import data_url, drawn, encoded, running

from vlm.errors import ConfigError
from vlm.serving.limits import Limits


def bomb(width=60_000, height=60_000):
    """Return a PNG of a few kilobytes whose header declares billions of pixels."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    lines = zlib.compress(b"\0" * 100_000, 9)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def code(reply):
    return reply.status, reply.json["error"]["code"]


@pytest.fixture(scope="module")
def tight(bundle):
    limits = Limits(body_bytes=100_000, items=3, pixels=10_000, waiting=2)
    with running(bundle, limits=limits) as server:
        yield server


@pytest.fixture(scope="module")
def impatient(bundle):
    with running(bundle, limits=Limits(seconds=3)) as server:
        yield server


def test_images_of_one_pixel_of_forty_million_and_a_decompression_bomb(server):
    one = encoded(Image.new("RGB", (1, 1), (200, 10, 10)))
    assert server.ask("/v1/embeddings", {"input": data_url(one)}).status == 200
    out = io.BytesIO()
    Image.fromarray(np.zeros((5000, 8000), np.uint8)).save(out, "PNG", compress_level=1)
    reply = server.ask("/v1/embeddings", {"input": data_url(out.getvalue())})
    assert code(reply) == (413, "image_too_large")
    assert "8,000 x 5,000" in reply.json["error"]["message"]
    reply = server.ask("/v1/embeddings", {"input": [data_url(bomb()), data_url(one)]})
    failed, made = reply.json["data"]
    assert (failed["error"]["code"], made["object"]) == ("image_too_large", "embedding")


def test_long_and_thin_images_are_embedded(server):
    thin = encoded(Image.new("L", (30_000, 1), 128))
    assert server.ask("/v1/embeddings", {"input": data_url(thin)}).status == 200


def test_bodies_items_and_images_over_the_limit_are_rejected(tight):
    assert code(tight.ask("/v1/embeddings", b" " * 100_001)) == (413, "body_too_large")
    assert code(tight.ask("/v1/embeddings", {"input": ["a"] * 4})) == (413, "too_many_items")
    picture = data_url(encoded(drawn(0, (101, 100))))
    assert code(tight.ask("/v1/embeddings", {"input": picture})) == (413, "image_too_large")
    connection = http.client.HTTPConnection("127.0.0.1", tight.socket.getsockname()[1])
    chunks = (b" " * 10_000 for _ in range(20))  # chunked: no content length
    connection.request("POST", "/v1/embeddings", chunks, {"Content-Type": "application/json"})
    assert connection.getresponse().status == 413
    connection.close()


def test_a_body_that_does_not_arrive_times_out(impatient):
    with socket.create_connection(impatient.socket.getsockname(), 10) as client:
        client.sendall(
            b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 50\r\n\r\n{"
        )
        assert b" 408 " in client.recv(200)


def test_requests_over_the_queue_limit_are_rejected(tight):
    release, held = threading.Event(), threading.Event()
    tight.service.model.batcher.call(lambda: (held.set(), release.wait()))
    held.wait()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(tight.ask, "/v1/embeddings", {"input": f"a{i}"}) for i in range(2)]
        while tight.service.admission.in_flight < 2:
            pass
        rejected = tight.ask("/v1/embeddings", {"input": "one more"})
        assert code(rejected) == (429, "busy")
        assert int(rejected.headers["retry-after"]) >= 1
        assert tight.ask("/v1/models").status == 200
        release.set()
        assert [answer.result().status for answer in waiting] == [200, 200]
    assert tight.service.admission.in_flight == 0
    # A request with more items than the queue limit is admitted when the server is idle.
    assert tight.ask("/v1/embeddings", {"input": ["a", "b", "c"]}).status == 200


def test_requests_that_would_time_out_are_rejected(server, monkeypatch):
    model = server.service.model
    monkeypatch.setattr(model.batcher, "_recent", dict.fromkeys(model.kinds(), 25.0))
    release, held = threading.Event(), threading.Event()
    model.batcher.call(lambda: (held.set(), release.wait()))
    held.wait()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.ask, "/v1/embeddings", {"input": "a"})
        while server.service.admission.in_flight < 1:
            pass
        rejected = server.ask("/v1/embeddings", {"input": "one more"})
        assert code(rejected) == (429, "busy")
        assert "the 1 items in flight take about 25 s" in rejected.json["error"]["message"]
        assert rejected.headers["retry-after"] == "25"
        release.set()
        assert waiting.result().status == 200


def test_a_slow_answer_times_out_and_its_items_leave_the_queue(impatient):
    release, held = threading.Event(), threading.Event()
    impatient.service.model.batcher.call(lambda: (held.set(), release.wait()))
    held.wait()
    reply = impatient.ask("/v1/embeddings", {"input": "a"})
    assert code(reply) == (503, "timeout")
    assert impatient.service.admission.in_flight == 0
    release.set()
    answers = (impatient.ask("/v1/embeddings", {"input": "a"}).status for _ in range(10))
    assert 200 in answers  # a busy machine may need longer than the timeout


def test_api_routes_need_a_key_and_page_health_and_metrics_do_not(bundle, index):
    with running(bundle, index=index, keys=("first", "zwölf")) as server:
        assert code(server.ask("/v1/models")) == (401, "invalid_api_key")
        assert server.ask("/v1/models").headers["www-authenticate"] == "Bearer"
        for wrong in ("", "firs", "first2", "zwolf"):
            assert (
                server.ask("/v1/models", headers={"Authorization": f"Bearer {wrong}"}).status == 401
            )
        assert server.ask("/v1/models", headers={"Authorization": "Basic first"}).status == 401
        assert server.ask("/v1/items/0/picture").status == 401
        assert server.ask("/v1/models", key="first").status == 200
        encoded_key = "zwölf".encode().decode("latin-1")
        assert server.ask("/v1/models", key=encoded_key).status == 200
        for public in ("/", "/healthz", "/metrics"):
            assert server.ask(public).status == 200


def test_other_host_names_are_rejected(bundle):
    with running(bundle, local=True) as server:
        port = server.socket.getsockname()[1]
        for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
            assert server.ask("/v1/models", headers={"Host": host}).status == 200
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example"):
            assert code(server.ask("/v1/models", headers={"Host": host})) == (400, "unknown_host")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_form_post_of_another_site_is_rejected(server, kind):
    reply = server.ask("/v1/search", b'{"query": "a"}', headers={"Content-Type": kind})
    assert code(reply) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Content-Type": "application/vnd.api+json; charset=utf-8"}, 200),
        ({"Origin": "http://HOST"}, 200),
        ({"Origin": "https://HOST"}, 200),  # behind a proxy with TLS
        ({"Origin": "https://page.example", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Origin": "http://HOST", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "http://HOST", "Sec-Fetch-Site": "same-site"}, 403),
    ],
)
def test_posts_of_other_origins_are_not_computed(server, headers, status):
    host = server.url.removeprefix("http://")
    headers = {name: value.replace("HOST", host) for name, value in headers.items()}
    reply = server.ask("/v1/search", {"query": "a"}, headers=headers)
    assert reply.status == status
    if status == 403:
        assert code(reply) == (403, "cross_origin")
    assert server.ask("/v1/models", headers=headers).status == 200


def test_a_key_is_needed_wherever_the_application_is_mounted(bundle):
    from starlette.applications import Starlette
    from starlette.routing import Mount
    from starlette.testclient import TestClient

    from vlm.serving.app import create_app

    app = create_app(bundle, keys=("secret",), max_batch=2)
    with TestClient(app, root_path="/api") as client:
        assert client.get("/api/v1/models").status_code == 401
        assert client.get("/api/healthz").status_code == 200
        assert client.get("/nothing").status_code == 401
    mounted = TestClient(Starlette(routes=[Mount("/models/a", app)]))
    assert mounted.get("/models/a/v1/models").status_code == 401
    assert mounted.get("/models/a/metrics").status_code == 200


@pytest.mark.parametrize("field", ["items", "pixels", "seconds", "waiting"])
def test_limits_of_zero_are_rejected(field):
    with pytest.raises(ConfigError, match=field):
        Limits(**{field: 0})
