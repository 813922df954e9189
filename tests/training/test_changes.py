"""Changes that a resumed run may make, and checks before the first step."""

import dataclasses
import json
import shutil

import pytest
from etils import epath
from processes import environment, losses, start, wait, write_config

from vlm.config import (
    Config,
    ConvNeXtConfig,
    DataConfig,
    Experiment,
    FieldFilter,
    MeshConfig,
    MixturePart,
    ModelConfig,
    OptimizerConfig,
    ViTConfig,
    from_dict,
    to_dict,
)
from vlm.errors import ConfigError
from vlm.training import preflight
from vlm.training.changes import check_changes
from vlm.training.loop import train


def test_accepted_changes_are_returned_and_others_refused_by_name():
    before = Experiment(steps=10)
    after = dataclasses.replace(
        before,
        mesh=MeshConfig(fsdp=4),
        batch_size=64,
        optimizer=OptimizerConfig(on_nonfinite="skip", clip_norm=None, b2=0.9),
        data=DataConfig(max_bad_share=0.5, filters=(FieldFilter("score", at_least=5.0),)),
    )
    row = {"feature": "score", "at_least": 5.0, "at_most": None, "one_of": []}
    changes = {
        "batch_size": [1024, 64],
        "data.filters": [[], [row]],
        "data.max_bad_share": [0.05, 0.5],
        "mesh.fsdp": [None, 4],
        "optimizer.b2": [0.98, 0.9],
        "optimizer.clip_norm": [1.0, None],
        "optimizer.on_nonfinite": ["stop", "skip"],
    }
    assert check_changes(before, after) == changes
    assert list(check_changes(before, after)) == sorted(changes)
    assert check_changes(before, before) == {}
    wrong = dataclasses.replace(after, lock="text", init_from="m", optimizer={"name": "lion"})
    with pytest.raises(ConfigError) as caught:
        check_changes(before, wrong)
    assert str(caught.value) == (
        "a resumed run cannot change --init-from (None to 'm'), which only acts at the start of a "
        "run; nor --lock ('none' to 'text'), which the saved optimizer state depends on (a phase "
        "of the run may change it); nor --optimizer.name ('adamw' to 'lion'), which the saved "
        "parameters or optimizer state depend on: leave that out, or start a new run, with "
        "--init-from this run to reuse its weights"
    )


VIT = ModelConfig(ViTConfig(image_size=32, projection="linear"))
CONV = ModelConfig(ConvNeXtConfig(image_size=64))


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ({"optimizer": {"ema": 0.9}}, {"optimizer": {"ema": 0.99}}, None),
        ({"optimizer": {"ema": 0.9}}, {}, "optimizer state"),
        ({"optimizer": {"weight_decay": 0, "l2_sp": 1.0}}, {"optimizer": {}}, "optimizer state"),
        ({"model": VIT}, {"model": CONV}, "saved parameters"),
        ({"model": VIT}, {"model": ModelConfig(ViTConfig(image_size=64, projection="linear"))},
         "position embeddings"),
        ({"model": CONV}, {"model": ModelConfig(ConvNeXtConfig(image_size=96))}, None),
        ({"model": VIT},
         {"model": ModelConfig(ViTConfig(image_size=32, projection="linear", patch_dropout=0.5))},
         None),
        ({}, {"data": {"hold_out": 0.1}}, "examples that it was trained on"),
        ({}, {"tokenizer": {"clean": "clip"}}, "saved with the tokenizer"),
        ({"run_dir": "a"}, {"run_dir": "b"}, "folder of --resume"),
        ({"adapter": {}, "init_from": "a"}, {"adapter": {}, "init_from": "b"}, None),
        ({"adapter": {}, "init_from": "a"}, {"adapter": {"rank": 2}, "init_from": "a"},
         r"--adapter\.rank \(8 to 2\)"),
        ({"data": {"mixture": [{"source": "a", "weight": 1}]}},
         {"data": {"mixture": [{"source": "a", "weight": 2}]}}, None),
    ],
)  # fmt: skip
def test_what_breaks_the_state_is_refused_with_its_reason(before, after, reason):
    base = {"tokenizer": {}}
    configs = [from_dict(Experiment, base | _json(c)) for c in (before, after)]
    if reason is None:
        assert check_changes(*configs)
    else:
        with pytest.raises(ConfigError, match=reason):
            check_changes(*configs)


def _json(fields: dict) -> dict:
    return {k: to_dict(v) if isinstance(v, Config) else v for k, v in fields.items()}


def test_a_change_inside_a_part_of_a_mixture_is_named():
    parts = MixturePart("a.tar", weight=2.0), MixturePart("b.tar", weight=1.0)
    before = Experiment(data=DataConfig(mixture=parts))
    other = dataclasses.replace(parts[1], weight=3.0)
    after = Experiment(data=DataConfig(mixture=(parts[0], other)))
    assert check_changes(before, after) == {"data.mixture.1.weight": [1.0, 3.0]}


@pytest.mark.slow
def test_a_run_of_eight_devices_resumes_on_four(tiny, tmp_path):
    """With another machine, another mesh, more steps, and a line in the history."""
    experiment = tiny(steps=6, mesh=MeshConfig(data=8), log_every=1)
    config = write_config(experiment, tmp_path / "config.json")
    run, log = tmp_path / "run", tmp_path / "log"
    env = environment(8)
    wait(start([config, "--run-dir", run], env, log), log)

    env = environment(4)
    refused = wait(start(["--resume", run, "--mesh.data", "3"], env, log), log, 1)
    assert "mesh data 3 x fsdp 1 x tensor 1 does not multiply" in refused
    mesh = ["--mesh.data", "1", "--mesh.fsdp", "4"]
    refused = wait(start(["--resume", run, *mesh, "--lock", "text"], env, log), log, 1)
    assert "lock 'text' keeps a tower as it starts" in refused
    refused = wait(start(["--resume", run, *mesh, "--steps", "4"], env, log), log, 1)
    assert "the run is at step 6 already, and cannot be 4 steps long" in refused

    wait(start(["--resume", run, *mesh, "--steps", "9"], env, log), log)
    assert len(losses(run)) == 9
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [row["total_steps"] for row in history] == [6, 9]
    assert history[1]["step"] == 6
    assert history[1]["changes"] == {"mesh.data": [8, 1], "mesh.fsdp": [None, 4], "steps": [6, 9]}
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
