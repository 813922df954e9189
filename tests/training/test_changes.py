"""Changes that a resumed run may make, and checks before the first step."""

import dataclasses
import json
import shutil

import pytest
from etils import epath
from processes import environment, losses, start, wait, write_config

from vlm.config import Experiment, MeshConfig, OptimizerConfig
from vlm.errors import ConfigError
from vlm.training import preflight
from vlm.training.changes import CHANGEABLE, changes_between, check_changes, flat_fields
from vlm.training.loop import train


def test_every_changeable_field_is_a_field():
    from vlm.config import to_dict

    whole = to_dict(Experiment())
    known = flat_fields(Experiment()).keys() | whole.keys()
    assert known >= CHANGEABLE


def test_changes_are_named_and_others_refused():
    before = Experiment(steps=10)
    after = dataclasses.replace(
        before, mesh=MeshConfig(fsdp=4), optimizer=OptimizerConfig(on_nonfinite="skip")
    )
    changes = {"mesh.fsdp": [1, 4], "optimizer.on_nonfinite": ["stop", "skip"]}
    assert check_changes(before, after) == changes
    wrong = dataclasses.replace(after, seed=1, optimizer=OptimizerConfig(b2=0.9))
    with pytest.raises(
        ConfigError, match=r"cannot change --optimizer.b2, --seed, which would make its check"
    ):
        check_changes(before, wrong)
    assert changes_between(before, before) == {}


@pytest.mark.slow
def test_a_run_of_eight_devices_resumes_on_four(tiny, tmp_path):
    """With another machine, another mesh, more steps, and a line in the history."""
    experiment = tiny(steps=6, mesh=MeshConfig(data=8), log_every=1)
    config = write_config(experiment, tmp_path / "config.json")
    run, log = tmp_path / "run", tmp_path / "log"
    env = environment(8)
    wait(start([config, "--run-dir", run], env, log), log)

    env = environment(4)
    refused = wait(start(["--resume", run], env, log), log, 1)
    assert "mesh data 8 x fsdp 1 x tensor 1 does not multiply" in refused
    mesh = ["--mesh.data", "1", "--mesh.fsdp", "4"]
    refused = wait(start(["--resume", run, *mesh, "--seed", "3"], env, log), log, 1)
    assert "a resumed run cannot change --seed" in refused
    refused = wait(start(["--resume", run, *mesh, "--steps", "4"], env, log), log, 1)
    assert "the run is at step 6 already, and cannot be 4 steps long" in refused

    wait(start(["--resume", run, *mesh, "--steps", "9"], env, log), log)
    assert len(losses(run)) == 9
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [row["total_steps"] for row in history] == [6, 9]
    assert history[1]["step"] == 6
    assert history[1]["changes"] == {"mesh.data": [8, 1], "mesh.fsdp": [1, 4], "steps": [6, 9]}
    assert json.loads((run / "config.json").read_text())["mesh"]["fsdp"] == 4


def test_a_new_length_is_kept_when_the_run_is_killed_before_its_next_checkpoint(tiny, tmp_path):
    run = tmp_path / "run"
    experiment = tiny(run_dir=str(run), steps=4)
    train(experiment)
    log = run / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows[-1]["seconds"] = 480.0
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(dataclasses.replace(experiment, steps=6), resume=run)
    # The time of a run is that of all its starts.
    seconds = [json.loads(line).get("seconds", 0) for line in log.read_text().splitlines()]
    assert max(seconds) > 480
    shutil.rmtree(run / "checkpoints" / "6")
    train(resume=run)
    assert (run / "checkpoints" / "6").exists()


def test_hosts_that_differ_are_named(monkeypatch):
    first = {}

    def broadcast(text):
        first.update(json.loads(text) | {"vlm": "9.9", "--seed": 7})
        return json.dumps(first)

    monkeypatch.setattr(preflight, "broadcast_text", broadcast)
    with pytest.raises(ConfigError) as caught:
        preflight.check_same_everywhere(Experiment(), resumed=False)
    message = str(caught.value)
    assert "--seed is 0 here and 7 there" in message
    assert "vlm is '" in message
    assert "start the same command in the same environment on every host" in message


def test_a_folder_that_cannot_be_made_is_reported_at_once(tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"file/run cannot be written \(Not a directory\): give"):
        train(tiny(run_dir=str(tmp_path / "file" / "run")))


def test_a_bucket_that_checkpoints_cannot_go_to_is_reported_at_once():
    message = r"cannot be written to s3://bucket/run, since Orbax.*or the path where the bucket is"
    with pytest.raises(ConfigError, match=message):
        preflight.check_folder(epath.Path("s3://bucket/run"))
