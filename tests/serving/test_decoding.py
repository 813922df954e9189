"""Images are decoded in processes with limits, which are killed and replaced."""

import io
import os
import pathlib
import re
import signal
import sys
import threading
import time

import numpy as np
import pytest
from image_bombs import png, saved, scan_bomb, slow_qoi
from PIL import Image
from serving import data_url, drawn, encoded, running

from vlm.config import PreprocessConfig
from vlm.display import webp
from vlm.errors import DataError
from vlm.inputs.preprocess import Preprocess
from vlm.serving import decoding
from vlm.serving.batched import DECODED_BYTES, Batched
from vlm.serving.decoding import EXTRA_BYTES, Decoders, decoder_count

PIXELS = 32_000_000
PREPROCESS = Preprocess(
    PreprocessConfig(image_size=16, background=(1, 2, 3)),
    max_pixels=PIXELS,
    max_bytes=DECODED_BYTES * PIXELS,
)


@pytest.fixture(scope="module")
def decoders():
    decoders = Decoders(PREPROCESS, 1, 30.0)
    yield decoders
    decoders.close()


def process_of(decoders):
    (worker,) = decoders._all
    return worker._process


def peak(process) -> int:
    """Peak of the resident memory, in bytes."""
    text = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", text)[1])


def test_a_process_decodes_as_this_one(decoders):
    picture = drawn(0)
    picture.putalpha(100)
    for form in ("PNG", "WEBP", "TIFF"):
        data = encoded(picture, form)
        expected = PREPROCESS.pixels(data)
        np.testing.assert_array_equal(decoders.run("pixels", data, "it"), expected)
    large = encoded(drawn(1, (1500, 1200)))
    opened = decoders.run("picture", large, "it", 1000)
    expected = PREPROCESS.open(large)
    expected.thumbnail((1000, 1000))
    np.testing.assert_array_equal(opened, np.asarray(expected))
    assert decoders.run("thumbnail", large, "it", 64).tobytes() == webp(large, 64)


def test_errors_are_those_of_this_process(decoders):
    for data in (b"junk", encoded(drawn(0))[:100], b"<html>", scan_bomb(100, 16, 16)):
        with pytest.raises(DataError) as here:
            PREPROCESS.pixels(data, "item 3")
        with pytest.raises(DataError) as there:
            decoders.run("pixels", data, "item 3")
        assert str(there.value) == str(here.value)


def test_a_process_that_takes_too_long_is_replaced():
    patient = 30.0  # on a busy machine a start takes longer than the deadline below
    decoders = Decoders(PREPROCESS, 1, patient)
    try:
        good = encoded(drawn(0))
        decoders.run("pixels", good, "it")
        first = process_of(decoders)
        decoders._seconds = 2.0
        with pytest.raises(DataError, match="item 2 takes too long to decode: remove or replace"):
            decoders.run("pixels", slow_qoi(14_000_000), "item 2")
        assert first.poll() is not None
        decoders._seconds = patient
        assert decoders.run("pixels", good, "it").shape == (16, 16, 3)
        assert process_of(decoders) is not first
    finally:
        decoders.close()


def test_a_process_that_was_killed_is_replaced_without_an_error(decoders):
    good = encoded(drawn(0))
    decoders.run("pixels", good, "it")
    process = process_of(decoders)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert decoders.run("pixels", good, "it").shape == (16, 16, 3)
    assert process_of(decoders) is not process


def test_processes_do_not_import_jax_and_end_with_the_server(decoders):
    decoders.run("pixels", encoded(drawn(0)), "it")
    process = process_of(decoders)
    if sys.platform == "linux":
        maps = pathlib.Path(f"/proc/{process.pid}/maps").read_text()
        assert "jaxlib" not in maps
    process.stdin.close()
    process.wait(30)
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    "make",
    [
        lambda: png(8000, 4000, 16, 0),
        lambda: png(8000, 4000, 16, 6),
        lambda: saved(Image.new("CMYK", (8000, 4000)), "JPEG"),
        lambda: saved(Image.new("RGB", (8000, 4000)), "JPEG", progressive=True),
        lambda: saved(Image.new("P", (8000, 4000)), "GIF", transparency=0),
        lambda: saved(Image.new("F", (8000, 4000)), "TIFF", compression="tiff_deflate"),
        lambda: saved(Image.new("RGBA", (4000, 3500)), "WEBP", method=0),
        lambda: scan_bomb(50, 7000, 3600),
    ],
)
def test_the_promised_memory_of_one_image(make):
    decoders = Decoders(PREPROCESS, 1, 60.0)
    try:
        decoders.run("pixels", encoded(drawn(0)), "it")
        before = peak(process_of(decoders))
        assert decoders.run("pixels", make(), "it").shape == (16, 16, 3)
        assert peak(process_of(decoders)) - before < DECODED_BYTES * PIXELS + EXTRA_BYTES
    finally:
        decoders.close()


def test_an_image_over_the_memory_limit_is_too_large(server):
    flat = io.BytesIO()
    Image.new("RGB", (6000, 5000)).save(flat, "WEBP", method=0)
    reply = server.ask("/v1/embeddings", {"input": data_url(flat.getvalue(), "image/webp")})
    assert (reply.status, reply.json["error"]["code"]) == (413, "image_too_large")
    assert "bytes of memory while it is decoded from WEBP" in reply.json["error"]["message"]


def test_texts_go_on_while_all_decoders_are_busy(bundle):
    model = Batched(bundle, decoders=1)
    release = threading.Event()
    try:
        image = model.image(lambda: release.wait(60) and encoded(drawn(0)))
        assert model.encode_text(["a red square"]).shape == (1, 8)
        health = model.image(np.zeros((8, 8, 3), np.uint8), first=True)
        assert health.result(60).shape == (8,)
        assert not image.done()
        release.set()
        assert image.result(60).shape == (8,)
    finally:
        release.set()
        model.close()


@pytest.mark.slow
def test_bombs_of_one_client_leave_the_texts_of_another(bundle):
    """Latency of texts and of the health check, and memory, under a client that sends bombs."""
    files = [
        (scan_bomb(50, 7000, 3600), "image/jpeg"),
        (slow_qoi(4_000_000)[: 10 << 20], "image/qoi"),
    ]
    files += [(png(8000, 4000, 16, 6), "image/png")]
    bodies = [{"input": data_url(*file)} for file in files]
    stop, seconds, health, statuses = threading.Event(), [], [], set()
    with running(bundle) as server:

        def attack(number: int) -> None:
            while not stop.is_set():
                reply = server.ask("/v1/embeddings", bodies[number % len(bodies)], timeout=120)
                statuses.add(reply.status)

        server.ask("/v1/embeddings", {"input": ["a", data_url(encoded(drawn(0)))]})
        attackers = [threading.Thread(target=attack, args=(number,)) for number in range(6)]
        for attacker in attackers:
            attacker.start()
        end = time.monotonic() + 15
        try:
            while time.monotonic() < end:
                for times, path, body in (
                    (seconds, "/v1/embeddings", {"input": f"a text {len(seconds)}"}),
                    (health, "/healthz", None),
                ):
                    start = time.monotonic()
                    assert server.ask(path, body).status == 200
                    times.append(time.monotonic() - start)
        finally:
            stop.set()
            for attacker in attackers:
                attacker.join()
        resident = sum(peak(worker._process) for worker in server.service.model.processes._all)
    assert statuses <= {200, 400, 503}
    assert max(np.percentile(seconds, 99), np.percentile(health, 99)) < 1
    count = os.cpu_count() or 1
    assert resident < count * (DECODED_BYTES * PIXELS + EXTRA_BYTES + (64 << 20))


def test_the_workers_together_fit_half_of_the_memory(monkeypatch):
    preprocess = Preprocess(PreprocessConfig(image_size=16), max_bytes=(1 << 30) - EXTRA_BYTES)
    monkeypatch.setattr(decoding.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(decoding, "_memory", lambda: 16 << 30)
    assert decoder_count(preprocess) == 8
    monkeypatch.setattr(decoding, "_memory", lambda: 1 << 30)
    assert decoder_count(preprocess) == 1
