"""Two processes over loopback are one run: equal losses and results, also when resumed."""

import dataclasses
import json
import random
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from processes import KILLS, environment, losses, send_at, start, wait, weights, write_config
from safetensors.numpy import load as load_safetensors

import vlm
from vlm.cluster import watch
from vlm.config import EvalConfig, PreprocessConfig
from vlm.training.loop import train

pytestmark = pytest.mark.slow
HEARTBEAT_TIMEOUT = 8  # seconds until a silent process counts as gone; 30 outside of tests
STEPS = 24


class Pair:
    """Two processes of four devices each, started as on two hosts."""

    def __init__(self, arguments: list, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.logs = [folder / f"log{i}" for i in range(2)]
        self.processes = [
            start(
                arguments,
                environment(
                    4,
                    JAX_COORDINATOR_ADDRESS=address,
                    JAX_NUM_PROCESSES="2",
                    JAX_PROCESS_ID=str(i),
                    VLM_HEARTBEAT_TIMEOUT=str(HEARTBEAT_TIMEOUT),
                ),
                log,
            )
            for i, log in enumerate(self.logs)
        ]

    def wait(self, *codes: int | None) -> list[str]:
        try:
            parts = zip(self.processes, self.logs, codes or (0, 0), strict=True)
            return [wait(*part) for part in parts]
        finally:
            for process in self.processes:
                process.kill()


@pytest.fixture(scope="module")
def pair(tiny, drawings, tmp_path_factory):
    """An uninterrupted run of two processes, evaluated on its held-out split twice."""
    folder = tmp_path_factory.mktemp("pair")
    again = EvalConfig("again", "retrieval", drawings, "test", captions=("caption",))
    classes = EvalConfig("classes", "zero-shot", drawings, "test", label="caption")
    experiment = tiny(
        steps=STEPS,
        checkpoint_every=0.1,
        log_every=1,
        vision={"dropout": 0.1},
        data={"eval_split": "test"},
        evals=(again, classes),
    )
    config = write_config(experiment, folder / "config.json")
    run = folder / "run"
    output = Pair([config, "--run-dir", run], folder).wait()
    return run, config, experiment, output


@pytest.mark.first_tier
def test_two_processes_are_one(pair, tmp_path):
    run, _, experiment, output = pair
    one = tmp_path / "run"
    train(dataclasses.replace(experiment, run_dir=str(one)))
    np.testing.assert_allclose(losses(run)[:10], losses(one)[:10], rtol=1e-6)
    ours, theirs = (load_safetensors(weights(r)) for r in (one, run))
    for name in ours:
        np.testing.assert_allclose(theirs[name], ours[name], atol=1e-5, err_msg=name)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(1, STEPS + 1))  # one log, of one process
    assert (run / "report.html").exists()
    results = json.loads((run / "results.json").read_text())["results"]
    named = {result["task"]: result["metrics"] for result in results}
    # Each host has read its share of the images, and all have all embeddings and labels.
    assert named["again retrieval"] == named["retrieval among 8 pairs"]
    assert named["classes zero-shot"]["top1"]["n"] == 8
    assert f"step 1/{STEPS}" in output[0]
    assert f"step 1/{STEPS}" not in output[1]


def test_two_processes_agree_on_sequence_and_text_lengths(tiny, tmp_path):
    """Each reads its own rows, and both must have arrays of the same shapes at every step."""
    naflex = PreprocessConfig(
        image_size=16, resize="naflex", patch_size=4, max_patches=16, kernel="bilinear"
    )
    experiment = tiny(
        steps=10,
        log_every=1,
        checkpoint_every=0.5,
        keep_checkpoints=2,
        vision={"max_patches": 16, "dropout": 0.1, "depth": 1},
        text={"causal": True, "pool": "end", "end_id": 1, "depth": 1},
        preprocess=naflex,
        sequence_lengths=(8, 16),
        text_lengths=(9, 10),
    )
    config, run = write_config(experiment, tmp_path / "config.json"), tmp_path / "run"
    Pair([config, "--run-dir", run], tmp_path).wait()
    one = tmp_path / "one"
    train(dataclasses.replace(experiment, run_dir=str(one)))
    np.testing.assert_allclose(losses(run), losses(one), rtol=1e-5)
    ours, theirs = (load_safetensors(weights(r)) for r in (one, run))
    for name in ours:
        np.testing.assert_allclose(theirs[name], ours[name], atol=1e-5, err_msg=name)
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "bundle")
    shutil.rmtree(again / "checkpoints" / "10")
    Pair(["--resume", again], tmp_path).wait()
    assert weights(again) == weights(run)


@pytest.mark.parametrize("_", range(KILLS))
def test_a_killed_or_interrupted_pair_ends_the_same(pair, tmp_path, _):
    whole, config, _, _ = pair
    run = tmp_path / "run"

    first = Pair([config, "--run-dir", run], tmp_path)
    send_at(signal.SIGKILL, random.randrange(4, 8), run, first.processes[1:])
    began = time.monotonic()
    output, _ = first.wait(watch.RETRY, -signal.SIGKILL)
    assert time.monotonic() - began < HEARTBEAT_TIMEOUT + 30
    assert f"process 1 of 2 on {socket.gethostname()} died" in output
    assert "vlm train --resume" in output

    second = Pair(["--resume", run], tmp_path)
    send_at(signal.SIGTERM, random.randrange(12, 16), run, second.processes)
    assert "stopped at step" in second.wait(0, 0)[0]

    Pair(["--resume", run], tmp_path).wait()
    assert weights(run) == weights(whole)
    assert losses(run) == losses(whole)


SIGNALLED = """
import os, signal, vlm

class Signalled(vlm.callbacks.Callback):
    def on_start(self, run):
        if run.resumed:
            os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_pair_that_is_interrupted_during_its_start_stops(pair, tmp_path, monkeypatch):
    """It comes after JAX has begun to listen, and before the first step: in a long restore, say."""
    run, *_ = pair
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(vlm.__file__).parents[1]}")
    monkeypatch.syspath_prepend(tmp_path)
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(again / "bundle")
    arguments = ["--resume", again, "--steps", "400", "--callbacks", "signalled:Signalled"]
    assert "stopped at step" in Pair(arguments, tmp_path).wait()[0]
    assert len(losses(again)) < 400


def test_the_coordinator_process_dies(pair, tmp_path):
    """JAX ends the other process without naming the dead one; a helper process names it."""
    _, config, _, _ = pair
    run = tmp_path / "run"
    two = Pair([config, "--run-dir", run], tmp_path)
    send_at(signal.SIGKILL, 4, run, two.processes[:1])
    began = time.monotonic()
    two.wait(-signal.SIGKILL, None)
    assert two.processes[1].returncode != 0
    named = "process 0 of 2 at 127.0.0.1:"  # JAX writes "died" too, before the helper process
    output = ""
    while named not in output and time.monotonic() - began < HEARTBEAT_TIMEOUT + 30:
        output = two.logs[1].read_text()
        time.sleep(0.1)
    assert named in output
    assert "vlm train --resume" in output


def test_an_error_of_one_is_an_error_of_all(pair, tmp_path):
    _, config, _, _ = pair
    Path(tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    output = Pair([config, "--run-dir", tmp_path / "run"], tmp_path).wait(1, 1)
    for one in output:
        assert "already holds a run" in one
