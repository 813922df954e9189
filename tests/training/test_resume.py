"""A run that is killed, interrupted or damaged resumes as if nothing had happened."""

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from processes import (
    KILLS,
    environment,
    last_step,
    losses,
    send_at,
    start,
    wait,
    weights,
    write_config,
)
from safetensors.numpy import load as load_safetensors

from vlm import sharding
from vlm.config import MeshConfig, from_dict, to_dict
from vlm.errors import CheckpointError, ConfigError, ShardingError, TrainingError
from vlm.training.loop import train
from vlm.training.schedule import is_scheduled

STEPS = 60
NOISE = {
    "vision": {"dropout": 0.1, "patch_dropout": 0.25},
    "optimizer": {"ema": 0.99, "l2_sp": 0.1},
}


# --------------------------------------------------------------------------- real processes


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """An uninterrupted run in its own process, and a function that starts another like it."""
    folder = tmp_path_factory.mktemp("alone")
    experiment = tiny(steps=STEPS, checkpoint_every=0.1, log_every=1, **NOISE)
    config = write_config(experiment, folder / "config.json")
    env = environment()
    run = folder / "run"
    wait(start([config, "--run-dir", run], env, folder / "log"), folder / "log")
    return run, config, env


@pytest.mark.first_tier
@pytest.mark.parametrize("_", range(KILLS))
def test_a_killed_and_interrupted_run_ends_bitwise_equal(alone, tmp_path, _):
    whole, config, env = alone
    run, log = tmp_path / "run", tmp_path / "log"
    first = start([config, "--run-dir", run], env, log)
    send_at(signal.SIGKILL, random.randrange(2, 20), run, [first])
    wait(first, log, -signal.SIGKILL)
    for number, soonest in ((signal.SIGTERM, 24), (signal.SIGINT, 40)):
        again = start(["--resume", run], env, log)
        send_at(number, random.randrange(soonest, soonest + 10), run, [again])
        message = wait(again, log, 0)
        left = last_step(run)
        assert f"stopped at step {left}; resume with `vlm train --resume {run}`" in message
        assert str(left) in os.listdir(run / "checkpoints")
    last = start(["--resume", run], env, log)
    wait(last, log)
    assert weights(run) == weights(whole)
    assert losses(run) == losses(whole)


# --------------------------------------------------------------- one process, damaged folders


@pytest.fixture(scope="module")
def eight(tiny, tmp_path_factory):
    """A finished run over eight devices with all its checkpoints: of steps 3, 6, 9 and 12."""
    folder = tmp_path_factory.mktemp("eight") / "run"
    train(tiny(run_dir=str(folder), log_every=1, keep_checkpoints=9, **NOISE))
    assert sorted(os.listdir(folder / "checkpoints"), key=int) == ["3", "6", "9", "12"]
    return Path(folder)


@pytest.fixture
def killed(eight, tmp_path) -> Path:
    """The same run as if it had been killed after step 6."""
    run = tmp_path / "run"
    shutil.copytree(eight, run)
    shutil.rmtree(run / "bundle")
    for step in (9, 12):
        shutil.rmtree(run / "checkpoints" / str(step))
    return run


def change(run: Path, **changes) -> None:
    """Another value in the config of a run."""
    file = run / "config.json"
    from vlm.config import Experiment

    experiment = from_dict(Experiment, json.loads(file.read_text()))
    file.write_text(json.dumps(to_dict(dataclasses.replace(experiment, **changes))))


def flat(run: Path) -> np.ndarray:
    arrays = load_safetensors(weights(run))
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)])


def test_a_resumed_run_equals_an_uninterrupted_one(eight, killed):
    train(resume=killed)
    assert weights(killed) == weights(eight)
    assert losses(killed) == losses(eight)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=8)], ids=["all", "fsdp"]
)
def test_a_run_resumes_on_another_mesh(eight, killed, mesh, monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 1)
    change(killed, mesh=mesh)
    train(resume=killed)
    np.testing.assert_allclose(losses(killed), losses(eight), rtol=1e-5)
    np.testing.assert_allclose(flat(killed), flat(eight), atol=1e-5)


def arrays_of(checkpoint: Path) -> list[Path]:
    """The files of array data."""
    return [p for p in (checkpoint / "state").rglob("*") if p.is_file() and p.parent.name == "d"]


@pytest.mark.parametrize("damage", ["truncated", "missing", "scrambled"])
def test_a_corrupt_checkpoint_is_skipped(eight, killed, damage, capfd):
    for file in arrays_of(killed / "checkpoints" / "6"):
        size = file.stat().st_size
        if damage == "truncated":
            os.truncate(file, size // 2)
        elif damage == "missing":
            file.unlink()
        else:
            with file.open("r+b") as data:
                data.seek(size // 2)
                data.write(os.urandom(64))
    train(resume=killed)
    assert "checkpoint 6 of" in capfd.readouterr().err.replace("\n", " ")
    assert weights(killed) == weights(eight)
    # The corrupt one was replaced: a run killed now has a complete checkpoint of step 6 again.
    for step in (9, 12):
        shutil.rmtree(killed / "checkpoints" / str(step))
    train(resume=killed)
    assert "skipped" not in capfd.readouterr().err


def test_with_only_corrupt_checkpoints_a_run_does_not_restart(killed):
    for step in (3, 6):
        for file in arrays_of(killed / "checkpoints" / str(step)):
            os.truncate(file, 10)
    with pytest.raises(CheckpointError, match=r"none of the checkpoints \[6, 3\]"):
        train(resume=killed)


def test_another_architecture_is_named(killed):
    experiment = json.loads((killed / "config.json").read_text())
    experiment["model"]["text"]["mlp_dim"] = 48
    (killed / "config.json").write_text(json.dumps(experiment))
    with pytest.raises(CheckpointError) as caught:
        train(resume=killed)
    message = str(caught.value)
    assert "checkpoint 6" in message
    assert "params/text/transformer/blocks/mlp/up/kernel: (2, 32, 64) saved, (2, 32, 48)" in message


def test_killed_before_its_first_checkpoint_a_run_starts_over(eight, killed, capfd):
    shutil.rmtree(killed / "checkpoints")
    train(resume=killed)
    assert "no checkpoint yet: it starts from step 0" in capfd.readouterr().err
    assert weights(killed) == weights(eight)


def wait_until_still(folder: Path) -> None:
    before, now = None, sorted(folder.rglob("*"))
    while now != before:
        time.sleep(1)
        before, now = now, sorted(folder.rglob("*"))


def test_a_full_disk_is_one_sentence_and_loses_nothing(eight, killed):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python itself does: writes fail instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(CheckpointError) as caught:
            train(resume=killed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(caught.value)
    assert "could not be written" in message
    assert "checkpoint 6 is complete and kept: free disk space and resume the run" in message
    wait_until_still(killed / "checkpoints")  # threads of the writer that failed may still write
    train(resume=killed)
    assert weights(killed) == weights(eight)


def test_a_finished_run_resumes_to_the_same_end(eight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(eight, run)
    train(resume=run)
    assert weights(run) == weights(eight)


# --------------------------------------------------------------------------- lengths, refusals


def test_seconds_become_steps_that_a_resumed_run_keeps(tiny, tmp_path, monkeypatch):
    from vlm.training import schedule

    monkeypatch.setattr(schedule, "step_times", lambda *_: [0.25])
    run = tmp_path / "run"
    train(tiny(run_dir=str(run), steps=None, seconds=2.0, log_every=1, keep_checkpoints=9))
    assert last_step(run) == 8
    whole = weights(run)
    for step in (6, 8):
        shutil.rmtree(run / "checkpoints" / str(step))
    monkeypatch.setattr(schedule, "step_times", lambda *_: [0.01])  # a faster machine
    train(resume=run)
    assert last_step(run) == 8
    assert weights(run) == whole


def test_events_are_scheduled_at_fractions_of_the_run():
    assert [s for s in range(1, 13) if is_scheduled(s, 12, 0.25)] == [3, 6, 9]
    assert [s for s in range(1, 4) if is_scheduled(s, 3, 0.01)] == [1, 2]
    assert not any(is_scheduled(s, 12, None) for s in range(13))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 12}, ShardingError, r"batch_size 12 .* 8 devices .* choose 8 or 16"),
        ({"micro_batch_size": 4}, ShardingError, r"micro_batch_size 4 does not divide .* choose 8"),
        ({"mesh": MeshConfig(data=16)}, ShardingError, r"data 16 .* there are 8"),
        ({"batch_size": 64}, Exception, r"global batch of 64 is larger than the 40 examples"),
        ({"steps": None}, ConfigError, r"no length: set one of steps"),
    ],
)
def test_invalid_configs_are_refused_before_training(tiny, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        train(tiny(run_dir=str(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()  # free for the next attempt


def test_a_run_that_cannot_start_keeps_existing_files(tiny, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine").write_text("kept")
    with pytest.raises(ShardingError):
        train(tiny(run_dir=str(tmp_path), batch_size=12))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]
    assert (tmp_path / "checkpoints" / "mine").read_text() == "kept"


def test_a_run_that_diverges_stops_and_keeps_its_checkpoints(killed):
    experiment = json.loads((killed / "config.json").read_text())
    # Each step multiplies the distance of the kernels from their start by a million.
    experiment["optimizer"] |= {"learning_rate": 1000.0, "l2_sp": 1000.0}
    (killed / "config.json").write_text(json.dumps(experiment))
    with pytest.raises(TrainingError, match=r"not finite at step \d+"):
        train(resume=killed)
    assert "6" in os.listdir(killed / "checkpoints")


def test_a_folder_with_a_run_is_not_overwritten(tiny, eight):
    with pytest.raises(ConfigError, match="already holds a run: resume it with"):
        train(tiny(run_dir=str(eight)))


# ------------------------------------------------------------------------- starting weights


@pytest.mark.parametrize("lock", ["none", "vision"])
def test_a_run_starts_from_another_model(tiny, eight, tmp_path, lock):
    run = tmp_path / "run"
    train(
        tiny(
            run_dir=str(run),
            init_from=str(eight),
            lock=lock,
            steps=1,
            optimizer={"learning_rate": 0.0, "ema": 0.9},
            profile=(1, 1) if lock == "none" else None,
        )
    )
    assert weights(run) == weights(eight)
    traced = list((run / "profile").rglob("*.xplane.pb"))
    assert bool(traced) == (lock == "none")


def test_one_tower_may_be_taken_from_another_model(tiny, eight, tmp_path):
    run = tmp_path / "run"
    train(
        tiny(
            run_dir=str(run),
            init_from=str(eight),
            init_towers="vision",
            text={"mlp_dim": 48},
            steps=1,
            optimizer={"learning_rate": 0.0},
        )
    )
    theirs, ours = (load_safetensors(weights(r)) for r in (eight, run))
    for name in ours:
        if name.startswith("vision"):
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_another_model_to_start_from_is_refused_by_name(tiny, eight, tmp_path):
    changes = {"text": {"mlp_dim": 48, "activation": "gelu"}}
    with pytest.raises(ConfigError) as caught:
        train(tiny(run_dir=str(tmp_path / "run"), init_from=str(eight), **changes))
    assert "model.text.mlp_dim is 64 in the model and 48 in the config" in str(caught.value)
    assert "model.text.activation is 'gelu_tanh' in the model and 'gelu' in the config" in str(
        caught.value
    )
