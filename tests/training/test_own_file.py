"""The file of the page on own parts: trained, killed and resumed, planned, loaded, served."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from processes import environment, send_at, start, wait, weights
from test_hosts import Pair

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[2] / "vlm" / "docs" / "howto" / "own_parts.md"
KILLED_AT = 23  # steps; checkpoints are after 10, 20 and 30 of 40


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The first block of the page, in a folder of its own, which is the working directory."""
    folder = tmp_path_factory.mktemp("own")
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    (folder / "my_parts.py").write_text(code)
    before = Path.cwd()
    os.chdir(folder)
    yield folder / "my_parts.py"
    os.chdir(before)


@pytest.fixture(scope="module")
def run(file):
    """An uninterrupted run on eight devices."""
    folder = file.parent / "run"
    log = file.parent / "log"
    arguments = [file.name, "--run-dir", folder, "--log-every", "1"]
    wait(start(arguments, environment(8), log), log)
    return folder


def vlm(*arguments, code=0, devices=1):
    """What a `vlm` command in the folder of the file prints to stdout."""
    command = [sys.executable, "-m", "vlm", *map(str, arguments)]
    done = subprocess.run(command, env=environment(devices), capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout


def test_the_file_has_at_most_60_lines(file):
    assert len(file.read_text().splitlines()) <= 60


def test_it_learns_and_its_evaluation_and_losses_are_logged(run):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    accuracy = [row["eval/accuracy/top1"] for row in rows if "eval/accuracy/top1" in row]
    assert len(accuracy) == 2  # half-way, and at the end
    assert accuracy[-1] > 0.9
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 40
    last = steps[-1]
    weighted = last["loss/softmax"] + 0.5 * last["loss/margin_loss"]
    assert last["loss"] == pytest.approx(weighted, rel=1e-5)
    assert last["loss/softmax"] < steps[0]["loss/softmax"]
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))


def test_killed_and_resumed_on_eight_devices_it_ends_bit_identical(file, run):
    folder, log = file.parent / "killed", file.parent / "killed.log"
    arguments = [file.name, "--run-dir", folder, "--log-every", "1"]
    process = start(arguments, environment(8), log)
    send_at(signal.SIGKILL, KILLED_AT, folder, [process])
    wait(process, log, -signal.SIGKILL)
    wait(start(["--resume", folder], environment(8), log), log)
    assert weights(folder) == weights(run)


def test_killed_and_resumed_in_two_processes_it_ends_bit_identical(file):
    def pair(*arguments):
        return Pair([*arguments, "--log-every", "1"], file.parent)

    whole, killed = file.parent / "pair", file.parent / "pair-killed"
    pair(file.name, "--run-dir", whole).wait()
    processes = pair(file.name, "--run-dir", killed)
    send_at(signal.SIGKILL, KILLED_AT, killed, processes.processes)
    processes.wait(-signal.SIGKILL, -signal.SIGKILL)
    pair("--resume", killed).wait()
    assert weights(killed) == weights(whole)


def test_it_is_planned(file):
    plan = json.loads(vlm("plan", file.name, "--topology", "v5e:2x4", "--json"))
    assert plan["topology"] == "v5e:2x4"
    assert plan["memory"]["basis"] in ("compiled", "analytic")


def test_it_is_loaded_only_after_its_module_was_imported(run):
    load = "import vlm; print(vlm.load('run').encode_text('a red square').shape)"
    command = [sys.executable, "-c", load]
    refused = subprocess.run(command, capture_output=True, text=True, env=environment(1))
    assert "uses code my_parts:ConvNet: import my_parts first" in refused.stderr
    command[-1] = f"import my_parts; {load}"
    loaded = subprocess.run(command, capture_output=True, text=True, env=environment(1))
    assert loaded.stdout.strip() == "(1, 32)", loaded.stderr


def test_it_is_served(run):
    command = [sys.executable, "-m", "vlm", "serve", "--model", "run", "--import", "my_parts"]
    command += ["--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(1))
    try:
        address = None
        for line in server.stderr:
            if match := re.search(r"http://[\w.:\[\]]+", line):
                address = match[0]
                break
        assert address is not None
        body = json.dumps({"input": ["a red square", "a blue square"], "model": "experiment"})
        request = urllib.request.Request(
            f"{address}/v1/embeddings", body.encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found = json.load(answer)["data"]
        assert [len(one["embedding"]) for one in found] == [32, 32]
    finally:
        server.terminate()
        server.wait(60)
