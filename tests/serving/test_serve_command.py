"""`vlm serve` on the command line: errors, export and shutdown."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import pytest
from serving import drawn, small_bundle

from vlm.cli import main
from vlm.serving.server import bind


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder with a model, pictures, and an index of them by that model."""
    folder = tmp_path_factory.mktemp("saved")
    small_bundle().save(folder / "model")
    (folder / "pictures").mkdir()
    for number in range(3):
        drawn(number).save(folder / "pictures" / f"{number}.png")
    assert (
        main(
            [
                "index",
                "--model",
                *map(str, (folder / "model", folder / "pictures", folder / "index")),
            ]
        )
        == 0
    )
    return folder


@pytest.fixture
def fail(capsys):
    """Function that runs `vlm serve`, expects a failure, and returns the error message."""

    def fail(*args, code=1):
        capsys.readouterr()
        assert main(["serve", *map(str, args)]) == code
        lines = capsys.readouterr().err.splitlines()
        (message,) = [line for line in lines if line.startswith("vlm: ")]
        return message

    return fail


def test_a_port_in_use_is_reported_before_the_model_is_loaded(fail):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"the port {port} of 127.0.0.1 is in use" in fail(
            "--model", "nothing", "--port", port
        )
    assert "no address of this machine" in fail(
        "--model", "nothing", "--host", "192.0.2.1", "--port", 0
    )
    assert "between 0 and 65535" in fail("--model", "nothing", "--port", 70_000)


def test_invalid_arguments_are_rejected_with_one_sentence(fail, saved, tmp_path):
    assert "there is no model" in fail("--model", tmp_path / "nothing", "--port", 0)
    assert "there is no index" in fail(tmp_path / "nothing", "--port", 0)
    small_bundle(seed=1, name="another").save(tmp_path / "another")
    message = fail(saved / "index", "--model", tmp_path / "another", "--port", 0)
    assert "embeds differently" in message
    assert "both towers" in fail(saved / "index", "--tower", "text", code=2)
    assert "API key is empty" in fail("--model", saved / "model", "--api-key", "", code=2)
    assert "body_bytes is 0" in fail("--model", saved / "model", "--port", 0, "--max-body-mib", 0)


def test_a_missing_extra_is_reported_with_its_install_command(fail, saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "vlm.serving.server")
    assert "pip install 'vlm-jax[serve]'" in fail("--model", saved / "model", "--port", 0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_in_flight_requests_are_answered_after_a_stop_signal(saved, number):
    line = [sys.executable, "-m", "vlm", "serve", saved / "index", "--port", "0"]
    process = subprocess.Popen(
        [*map(str, line), "--max-batch", "2"],
        env=os.environ | {"XLA_FLAGS": "", "VLM_API_KEYS": "one, two"},
        stderr=subprocess.PIPE,
        text=True,
    )
    output = ""
    while "serving at" not in output:
        output = process.stderr.readline()
        assert output, "the server exited before it was ready"
    url = re.search(r"http://\S+", output)[0]
    answers, errors = [], []

    def ask(number):
        body = json.dumps({"input": [f"text {number} {i}" for i in range(100)]}).encode()
        headers = {"Content-Type": "application/json", "Authorization": "Bearer two"}
        request = urllib.request.Request(f"{url}v1/embeddings", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                answers.append(len(json.loads(reply.read())["data"]))
        except Exception as error:
            errors.append(error)

    def in_flight() -> float:
        """Items that the server has accepted and not answered."""
        with urllib.request.urlopen(f"{url}metrics", timeout=30) as reply:
            return float(re.search(r"^vlm_waiting_items (\S+)", reply.read().decode(), re.M)[1])

    ask(0)
    numbers = itertools.count(1)
    both = False
    while not both:  # retry if the metrics were read too late
        threads = [threading.Thread(target=ask, args=(next(numbers),)) for _ in range(2)]
        for thread in threads:
            thread.start()
        while not both and any(thread.is_alive() for thread in threads):
            both = in_flight() > 100
        if not both:
            assert next(numbers) < 100, "two requests were never in flight at the same time"
    process.send_signal(number)
    for thread in threads:
        thread.join()
    assert process.wait(30) == 0
    assert process.stderr.read() == ""
    assert errors == []
    assert set(answers) == {100}


@pytest.mark.slow
def test_requests_are_logged_as_json(saved):
    line = [sys.executable, "-m", "vlm", "serve", saved / "index", "--port", "0", "--log", "json"]
    environment = os.environ | {"XLA_FLAGS": ""}
    with subprocess.Popen(
        list(map(str, line)), env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        output = ""
        while "serving at" not in output:
            output = process.stderr.readline()
            assert output, "the server exited before it was ready"
        url = re.search(r"http://\S+", output)[0]
        with urllib.request.urlopen(f"{url}v1/models?size=1", timeout=30) as reply:
            reply.read()
        entry = json.loads(process.stderr.readline())
        process.send_signal(signal.SIGTERM)
    assert (entry["method"], entry["path"], entry["status"]) == ("GET", "/v1/models", 200)
    assert (entry["client"], entry["bytes"], entry["level"]) == ("127.0.0.1", 0, "info")


def test_a_bound_port_is_free_again_once_it_is_closed():
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    listener.close()
    bind("127.0.0.1", port).close()
