"""Mutated images and bodies, sent to a real server.

    python tests/fuzz/server.py --cases 10000

Half of the cases are image files, mutated as `tests/fuzz/images.py` does, in a request that is
valid; the other half are requests whose JSON is mutated, in its values or in its bytes. Each must
be answered within 20 seconds, by a 2xx or a 4xx in JSON, with an error message of one line.
"""

import argparse
import base64
import collections
import importlib.util
import json
import pathlib
import random
import sys
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "serving")]

SECONDS = 20
CLIENTS = 8
ODD = (
    None, True, False, 0, -1, 1, 0.5, -0.0, 1e308, 10**30, "", " ", "a", "\0", "\ud800", "💥" * 9,
    "x" * 20_000, "data:", "data:,", "data:;base64,", "data:image/png;base64,AAAA", "http://[",
    "file:///etc/passwd", "../../etc/passwd", "{}", "{0.__class__}", "'; --", [], {}, [[]], [None],
    {"text": None}, {"a": {"b": {"c": []}}}, [[[[[[[[]]]]]]]],
)  # fmt: skip


def images():
    """The module that mutates image files."""
    spec = importlib.util.spec_from_file_location("fuzz_images", ROOT / "tests/fuzz/images.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def good_requests(url: str) -> list[tuple[str, object]]:
    """A request of each kind that is answered by 200."""
    return [
        ("/v1/embeddings", {"input": ["a", url], "encoding_format": "base64", "model": "small"}),
        ("/v1/embeddings", {"input": [{"image": url}, {"text": "b"}], "dimensions": 8}),
        (
            "/v1/classify",
            {
                "images": [url, 1], "labels": ["a", "b"], "templates": ["a {}"], "none": "c",
                "multi_label": True, "top": 2,
            },
        ),
        (
            "/v1/search",
            {
                "query": [{"text": "a", "weight": 2.0}, {"item": 3}, {"image": url, "weight": -1}],
                "k": 3,
                "where": [{"column": "year", "comparison": ">=", "value": 2001}],
                "min_score": -0.5,
            },
        ),
        ("/v1/explain", {"image": url, "text": "a"}),
    ]  # fmt: skip


def mutated(value: object, rng: random.Random) -> object:
    """The same JSON with one place changed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        made = dict(value)
        choice = rng.random()
        if choice < 0.15:
            del made[key]
        elif choice < 0.25:
            made[rng.choice(["", "extra", "\ud800", key * 50])] = made.pop(key)
        else:
            made[key] = mutated(value[key], rng)
        return made
    if isinstance(value, list) and value and rng.random() < 0.85:
        made = list(value)
        at = rng.randrange(len(made))
        if rng.random() < 0.2:
            return made * rng.choice([2, 10, 200])
        made[at] = mutated(value[at], rng)
        return made
    if isinstance(value, str) and value and rng.random() < 0.4:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice(["", "\n", "%", "\0", "é", "=", value]) + value[at + 1 :]
    return rng.choice(ODD)


def case(number: int, fuzz_images) -> tuple[str, bytes]:
    """The path and the body of a case."""
    rng = random.Random(number)
    if number % 2:
        form, _, data = fuzz_images.case(number // 2)
        url = f"data:image/{form.lower()};base64,{base64.b64encode(data).decode()}"
        path, body = rng.choice(good_requests(url))
        return path, json.dumps(body).encode()
    whole = fuzz_images.originals()["PNG"][0]
    path, body = rng.choice(good_requests(f"data:;base64,{base64.b64encode(whole).decode()}"))
    if rng.random() < 0.7:
        for _ in range(rng.choice([1, 1, 2, 5])):
            body = mutated(body, rng)
        return path, json.dumps(body).encode()
    raw = bytearray(json.dumps(body).encode())
    for _ in range(rng.choice([1, 3, 20])):
        at = rng.randrange(len(raw))
        raw[at : at + rng.choice([0, 1, 1, 8])] = rng.randbytes(rng.choice([0, 1, 1, 4]))
    return path, bytes(raw)


def outcome(server, number: int, fuzz_images) -> int:
    """The status of the answer to a case, which an AssertionError says is wrong."""
    path, body = case(number, fuzz_images)
    reply = server.ask(path, body, timeout=SECONDS)
    assert 200 <= reply.status < 500, (number, path, body[:300], reply.status, reply.body[:300])
    if reply.status >= 300:
        message = reply.json["error"]["message"]
        assert message, (number, reply.body)
        assert "\n" not in message, (number, message)
        assert len(message) < 1500, (number, message)
    return reply.status


def run(server, numbers) -> collections.Counter:
    """How many cases had which status; eight clients ask at once."""
    from vlm.serving.explain import warm_up

    server.service.model.warm_up()
    warm_up(server.service.model.bundle)
    fuzz_images = images()
    with ThreadPoolExecutor(CLIENTS) as pool:
        return collections.Counter(pool.map(lambda n: outcome(server, n, fuzz_images), numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    args = parser.parse_args()
    import tempfile

    from serving import running, saved_index, small_bundle

    bundle = small_bundle()
    with tempfile.TemporaryDirectory() as folder:
        index = saved_index(bundle, pathlib.Path(folder), {"year": range(2000, 2008)})
        with running(bundle, index=index) as server:
            counts = run(server, range(args.cases))
            assert server.ask("/healthz").status == 200
    print(f"{args.cases:,} cases, no 5xx and no hang: {dict(sorted(counts.items()))}")


if __name__ == "__main__":
    main()
