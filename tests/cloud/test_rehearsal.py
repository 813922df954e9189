"""A run's life on a pod, rehearsed: the real commands against a bucket that is far and unsure."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hosts import LIMIT, Hosts
from pod import SHARDS, STEPS, losses, partial_checkpoints, rows, weights, whole_checkpoints
from safetensors.numpy import load as load_safetensors

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(pod):
    """The run of two hosts that nobody disturbed."""
    Hosts(pod.go("whole"), pod.folder / "whole", pod.env, count=2).finish()
    return pod.run("whole")


@pytest.fixture(scope="module")
def disturbed(pod, whole):
    """The same run: unsure bucket, told to leave in a checkpoint, a host killed in another."""
    run, folder = pod.run("disturbed"), pod.folder / "disturbed"
    bucket = pod.bucket

    # A passing 503 and a broken connection; told to leave while a checkpoint is on its way.
    bucket.fail("503", "config.json", 2)
    bucket.fail("503", "disturbed%2Fcheckpoints%2F12", 3)
    bucket.fail("reset", "disturbed%2Flog.jsonl", 1)
    first = Hosts(pod.go("disturbed"), folder, pod.env, count=2)
    with bucket.hold("disturbed%2Fcheckpoints%2F24") as reached:
        wait_for(reached, first)
        first.signal(signal.SIGTERM)
        time.sleep(1)
    output = first.finish()
    assert "stopped at step" in output[0]
    newest = whole_checkpoints(run)[-1]
    assert f"stopped at step {newest};" in output[0]

    # A host is killed in the middle of a checkpoint, while reading it breaks off now and then.
    bucket.fail("reset", f"disturbed%2Fcheckpoints%2F{newest}%2Fstate", 2)
    second = Hosts(pod.go("disturbed"), folder, pod.env, count=2)
    with bucket.hold("disturbed%2Fcheckpoints%2F48") as reached:
        wait_for(reached, second)
        second.signal(signal.SIGKILL, 1)
        output = second.wait()
    assert "process 1 of 2" in output[0]
    assert "died" in output[0]
    assert "vlm train --resume" in output[0]
    assert (
        "the run has been w" in output[0]
    )  # waiting, or writing a checkpoint, with the other gone
    shutil.copytree(run, pod.run("killed"))

    third = Hosts(pod.go("disturbed"), folder, pod.env, count=2).finish()
    assert "step 48" not in third[0].split("first step after")[0]
    return run


def wait_for(reached, hosts: Hosts) -> None:
    end = time.monotonic() + LIMIT
    while not reached.wait(0.2):
        assert hosts.running(), "the run ended early:\n" + "\n".join(hosts.wait())
        assert time.monotonic() < end, "the run did not come so far"


def test_every_file_that_the_config_names_is_in_the_bucket(pod):
    assert "tokenizer.json: 52 tokens" in pod.artefacts
    root = pod.bucket.root
    assert len(list((root / "pairs").glob("*.tar"))) == SHARDS
    for name in (
        "tokenizers/c4_en/tokenizer.json",
        "evals/imagenet1k/classnames.txt",
        "evals/imagenet1k/val/0.tar",
        "evals/coco/test/nshards.txt",
    ):
        assert (root / name).is_file(), name
    assert list((root / "evals" / "imagenet1k" / "val").glob("*.vlm-index"))


def test_the_evaluations_of_the_config_are_measured(whole):
    measured = [row for row in rows(whole) if "eval/imagenet/top1" in row]
    assert [row["step"] for row in measured] == [STEPS // 2]
    assert "eval/coco/text_to_image_R@1" in measured[0]
    results = json.loads((whole / "results.json").read_text())["results"]
    assert [result["task"] for result in results] == ["imagenet zero-shot", "coco retrieval"]


def test_left_and_killed_on_two_hosts_a_run_ends_bit_for_bit_the_same(whole, disturbed):
    assert weights(disturbed) == weights(whole)
    assert losses(disturbed) == losses(whole)
    assert [step for step, _ in losses(whole)] == list(range(1, STEPS + 1))


def test_the_history_and_the_log_tell_what_happened(pod, disturbed):
    history = [json.loads(x) for x in (disturbed / "history.jsonl").read_text().splitlines()]
    assert [start["processes"] for start in history] == [2, 2, 2]
    assert history[0]["step"] == 0 < history[1]["step"] < history[2]["step"]
    written = [row for row in rows(disturbed) if "checkpoint/seconds" in row]
    assert written
    assert all(row["checkpoint/seconds"] >= row["checkpoint/stall"] for row in written)
    assert any("start/compiling" in row for row in rows(disturbed))
    assert list((disturbed / "tensorboard").iterdir())
    assert len(whole_checkpoints(disturbed)) == 2
    assert not partial_checkpoints(disturbed)  # nothing half is left behind


def test_it_goes_on_over_another_number_of_hosts_and_another_mesh(pod, whole, disturbed):
    """Two of four hosts hold each part of the parameters that the mesh cuts over `fsdp`."""
    run = pod.run("killed")
    line = [sys.executable, "-m", "vlm", "train", "--resume", "gs://bucket/runs/killed"]
    options = ["--mesh.fsdp", "2", "--checkpoint-minutes", "5"]
    output = Hosts([*line, *options], pod.folder / "killed", pod.env, count=4).finish()[0]
    assert any("text/embedding" in line and "fsdp" in line for line in output.splitlines())
    ours, theirs = (load_safetensors(weights(run)) for run in (run, whole))
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4, err_msg=name)
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
    assert not partial_checkpoints(run)
    last = json.loads((run / "history.jsonl").read_text().splitlines()[-1])
    assert last["processes"] == 4
    assert last["changes"] == {"checkpoint_minutes": [15.0, 5.0], "mesh.fsdp": [None, 2]}


def test_the_bundle_is_read_back_and_measured(pod, whole):
    code = """
import sys
import vlm
model = vlm.load("gs://bucket/runs/whole")
print(model.name, model.encode_text(["a red square"]).shape)
from vlm.cli import main
run, picture, data = "gs://bucket/runs/whole", *sys.argv[1:]
assert main(["classify", "--model", run, picture, "--labels", "red,blue"]) == 0
options = ["--data.eval-split", "test", "--data.captions", "caption"]
sys.exit(main(["eval", run, "--data.source", data, *options]))
"""
    import tiny

    picture = next((tiny.folder() / "data").glob("test-red-*.png"))
    done = subprocess.run(
        [sys.executable, "-c", code, picture, tiny.folder() / "data"],
        env=pod.env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "siglip-b16 (1, 16)" in done.stdout
    assert "red" in done.stdout
    assert "top1" in done.stdout
