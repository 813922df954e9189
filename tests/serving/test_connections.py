"""Limits and deadlines of connections and bodies, on a server of this process."""

import contextlib
import json
import logging
import socket
import time

import pytest
from attacks import head
from serving import data_url, drawn, encoded, running

from vlm.serving import bodies, connections
from vlm.serving.bodies import check_values
from vlm.serving.connections import _network
from vlm.serving.limits import Limits, RequestError
from vlm.serving.request_errors import field_name
from vlm.serving.request_log import LOGGER, JsonFormatter


@pytest.fixture(scope="module")
def tight(bundle):
    limits = Limits(
        body_bytes=1 << 20, waiting_bytes=1 << 20, connections=8, items=8,
        request_characters=5_000, characters=2_000,
    )  # fmt: skip
    with running(bundle, limits=limits, keys=("secret",)) as server:
        yield server


@pytest.fixture
def soon(monkeypatch):
    """Make the deadlines short."""
    for phase in ("head", "rest", "idle"):
        monkeypatch.setitem(connections.SECONDS, phase, 1.0)
    monkeypatch.setattr(connections, "SWEEP_SECONDS", 0.1)
    monkeypatch.setattr(connections, "WRITE_SECONDS", 1.0)


def connected(server):
    return socket.create_connection(server.socket.getsockname(), 10)


def received(client):
    """Return everything until the server closes the connection."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := client.recv(65536):
            data += part
    return data


def is_closed_while(client, data):
    """Send data ten times a second; return whether the server closes the connection."""
    try:
        for _ in range(100):
            client.sendall(data)
            time.sleep(0.1)
    except ConnectionError:
        return True
    return False


def error_of(data):
    return json.loads(data.partition(b"\r\n\r\n")[2])["error"]


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET / HTTP/1.1\r\nX-Long: " + b"a" * 70_000,
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a:b\r\n" * 300 + b"\r\n",
        b"POST /healthz HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"a:b\r\n" * 300,
    ],
)
def test_heads_and_trailers_over_the_limit_are_refused(tight, request_bytes):
    with connected(tight) as client:
        client.sendall(request_bytes)
        data = received(client)
    assert data.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 405 "))  # /healthz answers at once
    if data.startswith(b"HTTP/1.1 431 "):
        assert error_of(data)["code"] == "too_much"
        assert "the request has" in error_of(data)["message"]


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET\r\n\r\n"]
)
def test_what_is_not_http_is_refused(tight, data):
    with connected(tight) as client:
        client.sendall(data)
        assert error_of(received(client))["code"] == "invalid_http"


def test_a_chunked_body_may_not_have_many_small_chunks(tight):
    start = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connected(tight) as client:
        client.sendall(start + b"1\r\na\r\n" * 5_000)
        assert received(client)  # 401 or 431, and the end
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [b'{"input": ', b'"a"}'])
    headers = b"Content-Type: application/json\r\nAuthorization: Bearer secret\r\n"
    with connected(tight) as client:
        client.sendall(start[:-2] + headers + b"\r\n" + chunks + b"0\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_requests_may_not_be_sent_far_ahead(tight):
    with connected(tight) as client:
        client.sendall(b"GET /nothing HTTP/1.1\r\nHost: a\r\n\r\n" * 5)
        time.sleep(0.5)
        assert client.recv(65536).count(b"HTTP/1.1 401 ") == 5
    with connected(tight) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(b"GET /nothing HTTP/1.1\r\nHost: a\r\n\r\n" * 1_000)
        assert received(client).count(b"HTTP/1.1 401 ") < 100


@pytest.mark.slow
@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"GET / HTTP/1.1\r\nX: ",
        b"GET /nothing HTTP/1.1\r\nHost: a\r\n\r\n",  # answered, and then silent
        head("/v1/embeddings", 1000, "wrong"),
        head("/healthz", 1000),
    ],
)
def test_silent_connections_are_closed(tight, soon, monkeypatch, start):
    monkeypatch.setattr("vlm.serving.middleware.DRAIN_SECONDS", 0.5)
    with connected(tight) as client:
        client.sendall(start)
        begin = time.monotonic()
        received(client)
        assert time.monotonic() - begin < 8


@pytest.mark.slow
def test_bytes_now_and_then_do_not_keep_a_connection(tight, soon):
    with connected(tight) as client:
        assert is_closed_while(client, b"a")


@pytest.mark.slow
def test_a_client_that_does_not_read_is_closed(tight, soon):
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(tight.socket.getsockname())
        assert is_closed_while(client, b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n" * 8)


def test_the_connection_that_waits_longest_makes_room(tight):
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(30):
            clients.append(stack.enter_context(connected(tight)))
            clients[-1].sendall(b"GET / HT")
            time.sleep(0.01)
        assert tight.ask("/v1/models", key="secret").status == 200
        clients[0].settimeout(5)
        assert received(clients[0]) == b""  # the first was closed
        clients[-1].sendall(b"TP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert received(clients[-1]).startswith(b"HTTP/1.1 200 ")


def test_bodies_are_counted_as_they_arrive_and_a_stalled_one_makes_room(tight, monkeypatch):
    monkeypatch.setattr(bodies, "STALLED_SECONDS", 0.5)
    picture = data_url(b"not an image" * 60_000)
    declared = head("/v1/embeddings", 1 << 20, "secret")
    with contextlib.ExitStack() as stack:
        for _ in range(3):  # nothing of these arrives
            stack.enter_context(connected(tight)).sendall(declared)
        time.sleep(0.2)
        assert tight.ask("/v1/embeddings", {"input": picture}, key="secret").status == 400
        stalled = stack.enter_context(connected(tight))
        stalled.sendall(declared + b" " * 900_000)
        time.sleep(0.2)
        busy = tight.ask("/v1/embeddings", {"input": picture}, key="secret")
        assert (busy.status, busy.json["error"]["code"]) == (429, "busy")
        assert tight.ask("/v1/embeddings", {"input": "a"}, key="secret").status == 200
        time.sleep(0.6)
        assert tight.ask("/v1/embeddings", {"input": picture}, key="secret").status == 400
        assert received(stalled).startswith(b"HTTP/1.1 408 ")
    metrics = tight.ask("/metrics").body
    assert b"\nvlm_waiting_bytes 0.0" in metrics


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"1," * 100 + b"1]",
        b"[" * 200,
        b'["a",' + b'"b",' * 100 + b'"c"]',
        b"{" + b'"a":{' * 200,
        b'"\\\\",' + b"1," * 101,
        b'"' * 500 + b",[" * 500,
    ],
)
def test_bodies_of_many_values_are_refused(body):
    with pytest.raises(RequestError, match="more than 100 JSON values"):
        check_values(body, 100)


@pytest.mark.parametrize(
    "body",
    [
        b'{"input": "' + b"a, [b], {c}" * 1000 + b'"}',
        b'{"input": "' + b'\\"a,\\\\' * 1000 + b'"}',
        b'["a", "' + b"," * 200 + b'"]',
        b"",
    ],
)
def test_separators_in_texts_do_not_count(body):
    check_values(body, 100)


def test_texts_and_prompts_are_bounded_together(tight):
    def refused(path, body):
        error = tight.ask(path, body, key="secret").json["error"]
        return error["code"], error["param"]

    assert refused("/v1/embeddings", {"input": ["a" * 1500] * 4}) == ("text_too_long", "input")
    body = {"images": ["data:,"], "labels": ["a" * 100, "b"], "templates": ["{}" * 50]}
    assert refused("/v1/classify", body) == ("text_too_long", "templates[0]")
    body = {"images": ["data:,"], "labels": ["ab", "b"], "templates": ["{}" * 500] * 5}
    assert refused("/v1/classify", body) == ("text_too_long", "templates")
    body = {"images": ["data:,"], "labels": ["ab", ""], "templates": ["{}"]}
    assert refused("/v1/classify", body) == ("empty_text", "labels[1]")


@pytest.mark.slow
def test_prompts_of_requests_are_not_stored(tight, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path))
    picture = data_url(encoded(drawn(1)))
    body = {"images": [picture], "labels": [str(i) for i in range(300)], "templates": ["{}"]}
    assert tight.ask("/v1/classify", body, key="secret").status == 200
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"input": 5}, "input"),
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": ["a", 5]}, "input[1]"),
        ("/v1/embeddings", {"input": [{"image_url": {"url": 5}}]}, "input[0].image_url.url"),
        ("/v1/embeddings", {"input": [{"image_url": {}}]}, "input[0].image_url.url"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ("/v1/embeddings", {"input": "a", "dimensions": 4}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "model": "gpt-4"}, "model"),
        ("/v1/embeddings", {"input": ""}, "input"),
        ("/v1/embeddings", {"input": ["", ""]}, "input[0]"),
        ("/v1/embeddings", {"input": ["a"] * 9}, "input"),
        ("/v1/embeddings", 5, None),
        ("/v1/classify", {"images": ["data:,"], "labels": ["a"]}, "images[0]"),
        ("/v1/classify", {"images": ["data:,"], "labels": ["a", 5]}, "labels[1]"),
        ("/v1/explain", {"image": "data:,", "text": "a"}, "image"),
        ("/v1/explain", {"image": "data:,", "text": ""}, "text"),
    ],
)
def test_the_field_of_an_error_is_named_as_openai_does(tight, path, body, param):
    error = tight.ask(path, body, key="secret").json["error"]
    assert error["param"] == param
    assert set(error) == {"message", "type", "code", "param"}


def test_field_names_are_short_and_valid_unicode():
    assert field_name([]) is None
    assert field_name(["a", 0, 1, "b"]) == "a[0][1].b"
    assert field_name(["\ud800" + "a" * 1000]) == "?" + "a" * 99


def test_requests_are_logged_as_text_or_json(tight, caplog):
    LOGGER.propagate = True
    with caplog.at_level(logging.INFO, LOGGER.name):
        tight.ask("/v1/embeddings?q=private", {"input": "a"}, key="secret")
        tight.ask("/v1/embeddings", {"input": 5}, key="secret")
        tight.ask("/a%0Ab")
        time.sleep(0.2)
    texts = [record.getMessage() for record in caplog.records]
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    assert [line["status"] for line in lines] == [200, 422, 401]
    assert [line["code"] for line in lines] == [None, "invalid_field", "invalid_api_key"]
    assert (lines[0]["method"], lines[0]["path"]) == ("POST", "/v1/embeddings")
    assert (lines[0]["client"], lines[0]["bytes"]) == ("127.0.0.1", len(b'{"input": "a"}'))
    assert lines[0]["time"].endswith("Z")
    assert texts[0].startswith("127.0.0.1 POST '/v1/embeddings' 200 ")
    assert not any("\n" in text or "private" in text for text in texts)


@pytest.mark.parametrize(
    ("peer", "network"),
    [
        (("10.0.0.1", 5), "10.0.0.1"),
        (("::ffff:10.0.0.1", 5, 0, 0), "10.0.0.1"),
        (("2001:db8:1:2:3::4", 5, 0, 0), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 5, 0, 0), "fe80::/64"),
        ("", ""),
        (None, ""),
    ],
)
def test_addresses_are_grouped_by_network(peer, network):
    assert _network(peer) == network
