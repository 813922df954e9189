"""Requests and responses over a real connection."""

import base64
import copy
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from serving import data_url, drawn, encoded, running

from vlm.bundle import Bundle
from vlm.explanation.heat_map import explain
from vlm.heads.retrieval import RetrievalIndex
from vlm.heads.zero_shot import ZeroShotClassifier
from vlm.serving.explain import warm_up


def rows(reply):
    assert reply.status == 200, reply.body
    return np.array([item["embedding"] for item in reply.json["data"]], np.float32)


def test_embeddings_equal_those_of_the_bundle(server, bundle):
    texts, pictures = ["a red square", "b " * 60, "c"], [drawn(1), drawn(2, (9, 70))]
    found = rows(
        server.ask(
            "/v1/embeddings",
            {
                "input": [
                    texts[0],
                    {"image": data_url(encoded(pictures[0]))},
                    {"text": texts[1]},
                    {"type": "image_url", "image_url": {"url": data_url(encoded(pictures[1]))}},
                    texts[2],
                ],
                "model": "small",
                "encoding_format": "float",
            },
        )
    )
    assert np.allclose(found[[0, 2, 4]], bundle.encode_text(texts), atol=1e-5)
    assert np.allclose(found[[1, 3]], bundle.encode_image(pictures), atol=1e-5)


def test_base64_and_usage_follow_the_openai_api(server, bundle):
    reply = server.ask("/v1/embeddings", {"input": "a green stripe", "encoding_format": "base64"})
    (item,) = reply.json["data"]
    row = np.frombuffer(base64.b64decode(item["embedding"]), "<f4")
    assert np.allclose(row, bundle.encode_text("a green stripe")[0], atol=1e-5)
    assert (item["object"], item["index"]) == ("embedding", 0)
    count = bundle.tokenizer.lengths("a green stripe")[0]
    assert reply.json["usage"] == {"prompt_tokens": count, "total_tokens": count}
    assert (reply.json["object"], reply.json["model"]) == ("list", "small")


def test_truncated_embeddings_are_those_of_the_truncated_model(server, bundle):
    reply = server.ask("/v1/embeddings", {"input": "a green stripe", "dimensions": 6}).json
    found = np.array(reply["data"][0]["embedding"])
    expected = bundle.with_dimensions(6).encode_text("a green stripe")[0]
    assert np.allclose(found, expected, atol=1e-5)


def test_a_prompt_is_put_before_texts(server, bundle):
    text = "a green stripe"
    reply = server.ask("/v1/embeddings", {"input": text, "prompt": "query"}).json
    found = np.array(reply["data"][0]["embedding"])
    assert np.allclose(found, bundle.encode_text(text, prompt="query")[0], atol=1e-5)
    assert not np.allclose(found, bundle.encode_text(text)[0], atol=1e-3)
    assert reply["usage"]["prompt_tokens"] == bundle.tokenizer.lengths(text, "query")[0]
    hits = server.ask("/v1/search", {"query": text, "prompt": "query", "k": 1}).json["data"]
    plain = server.ask("/v1/search", {"query": text, "k": 1}).json["data"]
    assert hits[0]["score"] != plain[0]["score"]


def test_an_error_belongs_to_its_item(server):
    good = data_url(encoded(drawn(3)))
    truncated = data_url(encoded(drawn(3))[:-40])
    items = [good, truncated, "", {"image": "data:image/png;base64,!"}, "x" * 20_000, "fine", {}]
    data = server.ask("/v1/embeddings", {"input": items}).json["data"]
    assert [item["object"] for item in data] == [
        "embedding", "error", "error", "error", "error", "embedding", "error",
    ]  # fmt: skip
    assert [item["index"] for item in data] == list(range(7))
    codes = [item["error"]["code"] for item in data if item["object"] == "error"]
    assert codes == [
        "invalid_image", "empty_text", "invalid_image", "text_too_long", "invalid_item",
    ]  # fmt: skip
    messages = [item["error"]["message"] for item in data if item["object"] == "error"]
    assert all(f"item {i}" in text for i, text in zip((1, 2, 3, 4, 6), messages, strict=True))


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"input": []}, 422, "invalid_field"),
        ({"input": [[1, 2, 3]]}, 422, "invalid_field"),
        ({"input": 5}, 422, "invalid_field"),
        ({}, 422, "invalid_field"),
        ({"input": "a", "model": "gpt-4"}, 404, "model_not_found"),
        ({"input": "a", "dimensions": 4}, 400, "invalid_dimensions"),
        ({"input": "a", "prompt": "document"}, 400, "invalid_prompt"),
        ({"input": "a", "encoding_format": "int8"}, 422, "invalid_field"),
        ({"input": "\ud800"}, 422, "invalid_field"),
        ({"input": ["a"] * 300}, 413, "too_many_items"),
        ({"input": ""}, 400, "empty_text"),
        ({"input": "data:image/png;base64,AAAA"}, 400, "invalid_image"),
        ({"input": {"image": "http://127.0.0.1:1/x.png"}}, 400, "url_not_allowed"),
        ({"input": {"image": "file:///etc/hostname"}}, 400, "invalid_image"),
        ({"input": {"image": "/etc/hostname"}}, 400, "invalid_image"),
        (b"{", 400, "invalid_json"),
        (b"\xff\xfe", 400, None),
        (b"[" * 5_000, 400, None),
        (b"[" * 100_000, 413, "too_many_items"),
    ],
)
def test_invalid_requests_are_rejected_with_one_sentence(server, body, status, code):
    reply = server.ask("/v1/embeddings", body)
    error = reply.json["error"]
    assert (reply.status, "\n" in error["message"]) == (status, False), reply.body
    assert code is None or error["code"] == code
    assert error["type"] == "invalid_request_error"


def test_label_scores_equal_those_of_the_classifier(server, bundle):
    pictures, labels = [drawn(4), drawn(5)], ["red", "green", "blue"]
    body = {"images": [*(data_url(encoded(p)) for p in pictures), 4], "labels": labels}
    data = server.ask(
        "/v1/classify", {**body, "templates": ["a {}."], "other_label": "a thing."}
    ).json
    classify = ZeroShotClassifier(bundle, labels, ["a {}."], other_label="a thing.")
    for item, expected in zip(data["data"], classify([*pictures, drawn(4)]).top(9), strict=True):
        assert [pair["label"] for pair in item["labels"]] == [label for label, _ in expected]
        scores = [pair["score"] for pair in item["labels"]]
        assert np.allclose(scores, [score for _, score in expected], atol=1e-5)
    mixed = server.ask("/v1/classify", {**body, "images": ["data:,", 3, 999], "top": 1}).json
    assert [item["object"] for item in mixed["data"]] == ["error", "classification", "error"]
    assert server.ask("/v1/classify", {**body, "templates": ["no place"]}).status == 400


def test_search_equals_the_search_of_the_index(server, bundle, index):
    here = RetrievalIndex.load(index, bundle)

    def found(body):
        reply = server.ask("/v1/search", body)
        assert reply.status == 200, reply.body
        return [(item["id"], round(item["score"], 4)) for item in reply.json["data"]]

    def expected(query, **options):
        return [(hit.id, round(hit.score, 4)) for hit in here.search(query, **options)]

    assert found({"query": "a red square", "k": 5}) == expected("a red square", k=5)
    picture = {"image": data_url(encoded(drawn(9)))}
    assert found({"query": [picture], "k": 3}) == expected(drawn(9), k=3)
    conditions = [
        {"column": "year", "comparison": ">=", "value": 2003},
        {"column": "kind", "comparison": "=", "value": "odd"},
    ]
    kept = expected("blue", k=9, where=lambda c: (c["year"] >= 2003) & (c["kind"] == "odd"))
    assert found({"query": "blue", "k": 9, "where": conditions}) == kept
    assert 0 < len(kept) < 9
    from vlm.heads.query import Query

    mixed = 2 * Query("red") + Query(drawn(9)) - Query("blue")
    terms = [{"text": "red", "weight": 2}, picture, {"text": "blue", "weight": -1}]
    assert found({"query": terms, "k": 4}) == expected(mixed, k=4)
    like = found({"query": [{"item": 9}], "k": 5})
    assert like == [(hit.id, round(hit.score, 4)) for hit in here.like(here.ids[9], k=5)]
    assert found({"query": "blue", "min_score": 2.0}) == []


def test_searches_at_the_same_time_equal_searches_one_by_one(server):
    """They differ in the count, the filter and the minimum; some are invalid."""
    even = [{"column": "kind", "comparison": "=", "value": "even"}]
    bodies = [
        {"query": text, "k": k, "where": where, **least}
        for text, k in (("red", 1), ("blue", 7), ("a stripe", 30))
        for where in ([], even, [{"column": "no", "comparison": "=", "value": 1}])
        for least in ({}, {"min_score": 0.1})
    ]

    def answer(body):
        reply = server.ask("/v1/search", body)
        found = reply.json.get("data", [])
        return reply.status, [(item["id"], round(item["score"], 5)) for item in found]

    alone = [answer(body) for body in bodies]
    assert {status for status, _ in alone} == {200, 400}
    held, release = threading.Event(), threading.Event()
    searches = server.service.gallery._searches
    searches.call(lambda: (held.set(), release.wait(20)))
    held.wait()
    with ThreadPoolExecutor(len(bodies)) as clients:
        answers = clients.map(answer, bodies)
        end = time.monotonic() + 10
        while sum(searches.depths().values()) < len(bodies) and time.monotonic() < end:
            time.sleep(0.01)
        release.set()
        assert list(answers) == alone


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"query": []}, 422),
        ({"query": "a", "k": 0}, 422),
        ({"query": "a", "k": 10**9}, 422),
        ({"query": "a", "min_score": float("nan")}, 422),
        ({"query": [{"text": "a", "weight": 0}]}, 400),
        ({"query": [{"text": "a", "weight": 1e999}]}, 422),
        ({"query": [{"text": "a", "image": "data:,"}]}, 400),
        ({"query": [{"text": "a"}, {"text": "a", "weight": -1}]}, 400),
        ({"query": [{"item": 24}]}, 404),
        ({"query": [{"item": -1}]}, 404),
        ({"query": "a", "where": [{"column": "no", "comparison": "=", "value": 1}]}, 400),
        ({"query": "a", "where": [{"column": "year", "comparison": "=", "value": "x"}]}, 400),
        ({"query": "a", "where": [{"column": "kind", "comparison": "<", "value": 10**400}]}, 422),
    ],
)
def test_invalid_searches_are_rejected(server, body, status):
    assert server.ask("/v1/search", body).status == status


def test_the_index_is_described(server):
    about = server.ask("/v1/index").json
    assert about["count"] == len(about["first"]) == 24
    columns = {column["name"]: column for column in about["columns"]}
    assert columns["year"] == {
        "name": "year", "kind": "number", "values": [2000, 2001, 2002, 2003, 2004],
        "least": 2000, "most": 2004, "earliest": None, "latest": None, "times": False,
    }  # fmt: skip
    assert columns["kind"]["values"] == ["even", "odd"]
    assert server.ask("/v1/items/7").json["metadata"] == {"year": 2002, "kind": None}


def test_only_thumbnails_of_the_index_are_served(server):
    reply = server.ask("/v1/items/3/picture?size=20")
    image = Image.open(io.BytesIO(reply.body))
    assert (reply.headers["content-type"], image.format, image.size) == (
        "image/webp", "WEBP", (40, 30),
    )  # fmt: skip
    assert server.ask("/v1/items/24/picture").status == 404
    assert server.ask("/v1/items/-1/picture").status == 422
    assert server.ask("/v1/items/..%2f..%2fetc/picture").status in (404, 422)
    assert server.ask("/static/..%2fapp.py").status == 404
    assert server.ask("/static/%2e%2e/app.py").status == 404


def test_models_health_and_metrics(server):
    (card,) = server.ask("/v1/models").json["data"]
    assert (card["id"], card["embed_dim"], card["modalities"]) == ("small", 8, ["image", "text"])
    assert server.ask("/v1/models/small").json == card
    assert server.ask("/v1/models/other").status == 404
    health = server.ask("/healthz").json
    assert health["status"] == "ok"
    assert set(health["seconds"]) == {"image", "text"}
    text = server.ask("/metrics").body.decode()
    assert 'vlm_requests_total{path="/v1/models",status="200"}' in text
    assert 'vlm_batch_items_count{tower="text"}' in text
    assert "\nvlm_waiting_items 0.0" in text


def test_the_health_check_fails_with_the_model(bundle):
    with running(bundle) as server:
        server.service.model.bundle = None
        reply = server.ask("/healthz")
        assert (reply.status, reply.json["error"]["code"]) == (503, "unhealthy")


def test_search_without_an_index_is_rejected(bundle):
    with running(bundle) as server:
        reply = server.ask("/v1/search", {"query": "a"})
        assert (reply.status, reply.json["error"]["code"]) == (404, "no_index")
        error = server.ask("/v1/classify", {"images": [0], "labels": ["a"]}).json["error"]
        assert "no index" in error["message"]


def test_the_page_forbids_requests_to_other_hosts(server):
    policy = server.ask("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    document = server.ask("/openapi.json").json
    assert {"/v1/embeddings", "/v1/classify", "/v1/search", "/v1/models", "/healthz"} <= set(
        document["paths"]
    )


def test_the_heat_map_equals_that_of_explain(server, bundle):
    body = {"image": data_url(encoded(drawn(4))), "text": "a red square"}
    found = explain(bundle, drawn(4), "a red square")
    reply = server.ask("/v1/explain", body)
    assert reply.status == 200, reply.body
    heat = np.array(reply.json["heat"])
    assert heat.shape == (30, 40)
    assert np.allclose(heat, found.heat, atol=1e-3)
    assert reply.json["score"] == pytest.approx(found.cosine, abs=1e-5)
    assert [token["token"] for token in reply.json["tokens"]] == [t for t, _ in found.tokens]
    of_item = server.ask("/v1/explain", {**body, "image": 4}).json
    assert np.allclose(of_item["heat"], heat, atol=1e-3)
    for wrong, status in (({"image": 99}, 404), ({"image": "data:,"}, 400), ({"text": ""}, 422)):
        assert server.ask("/v1/explain", {**body, **wrong}).status == status


def test_a_large_image_has_a_small_heat_map(server, bundle):
    warm_up(bundle)
    body = {"image": data_url(encoded(drawn(4, (1500, 600)))), "text": "a"}
    heat = np.array(server.ask("/v1/explain", body).json["heat"])
    assert heat.shape == (26, 64)
    assert (heat >= 0).all()
    assert (heat <= 1).all()


def test_requests_for_a_missing_tower_are_rejected(bundle):
    model = copy.copy(bundle.model)
    model.text = None
    image_only = Bundle(model, bundle.preprocess, bundle.tokenizer, "eyes")
    with running(image_only) as server:
        picture = data_url(encoded(drawn(1)))
        assert server.ask("/v1/embeddings", {"input": picture}).status == 200
        for path, body in (
            ("/v1/embeddings", {"input": "a"}),
            ("/v1/classify", {"images": [picture], "labels": ["a", "b"]}),
            ("/v1/explain", {"image": picture, "text": "a"}),
        ):
            reply = server.ask(path, body)
            assert (reply.status, reply.json["error"]["code"]) == (400, "no_tower")
            assert "text tower" in reply.json["error"]["message"]
        assert set(server.ask("/healthz").json["seconds"]) == {"image"}
