"""A resumed run with other options: its state, its position in the data, and its history."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from processes import environment, losses, start, wait, write_config
from test_hosts import Pair

from vlm.config import AugmentConfig, Experiment, FieldFilter
from vlm.data.pipeline import TrainIterator, train_batches
from vlm.errors import ConfigError, DataError
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import train_bpe
from vlm.paths import as_path
from vlm.training.history import read_history
from vlm.training.loop import train
from vlm.training.run import Run

# ------------------------------------------------------------------------ the position in the data


def batches_of(e: Experiment, batch_size: int, seed: int = 0, **changes) -> TrainIterator:
    tokenizer = train_bpe(["a red bar at the top left"], 280, 16)
    data = dataclasses.replace(e.data, augment=AugmentConfig(crop=None), **changes)
    preprocess = Preprocess(e.preprocess)
    return train_batches(data, preprocess, tokenizer, batch_size=batch_size, seed=seed)


def images(batch: dict) -> list[bytes]:
    return [image.tobytes() for image in batch["images"]]


def json_state(batches: TrainIterator) -> dict:
    return json.loads(json.dumps(batches.get_state()))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_another_batch_size_uses_each_example_once_in_the_pass(tiny, workers):
    first = batches_of(tiny(), 8, workers=workers)
    seen = [image for _ in range(2) for image in images(next(first))]
    second = batches_of(tiny(), 4, workers=workers)
    second.resume(json_state(first))
    assert second.position_change == "continues at step 2 (changed: --batch-size)"
    assert (second.step, second.samples) == (2, 16)
    seen += [image for _ in range(3) for image in images(next(second))]
    third = batches_of(tiny(), 12, workers=workers)
    third.resume(json_state(second))
    seen += images(next(third))
    assert len(seen) == len(set(seen)) == 40  # all examples of the training split
    assert third.samples == 40
    again = batches_of(tiny(), 12, workers=workers)
    again.resume(json_state(third))
    assert again.position_change == ""
    assert images(next(again)) == images(next(third))
    for batches in (first, second, third, again):
        batches.close()


def test_other_data_starts_a_new_pass_that_later_resumes_continue(tiny):
    first = batches_of(tiny(), 8)
    next(first)
    kept = tiny(data={"filters": (FieldFilter("caption", one_of=captions(tiny, "red")),)})
    second = batches_of(kept, 4)
    second.resume(json_state(first))
    assert second.position_change == (
        "starts a new pass at step 1 (changed: --batch-size and --data.filters)"
    )
    seen = images(next(second))
    third = batches_of(kept, 4)
    third.resume(json_state(second))
    assert third.position_change == ""
    seen += images(next(third))
    assert len(seen) == len(set(seen)) == 8
    with pytest.raises(DataError, match=r"other data \(40 examples, here 10\).* another --seed"):
        batches_of(kept, 8).set_state(json_state(first))
    own = batches_of(tiny(), 8, seed=1)
    own.resume(json_state(first))
    assert own.position_change == "starts a new pass at step 1 (changed: --seed)"


def captions(tiny, colour: str) -> tuple[str, ...]:
    rows = (Path(tiny().data.source) / "captions.jsonl").read_text().splitlines()
    return tuple(c for row in rows if colour in (c := json.loads(row)["caption"]))


# ----------------------------------------------------------------------------------- the whole run


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory) -> Path:
    """A finished run of six steps, which can be made longer."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    train(tiny(run_dir=str(run), steps=6, log_every=1, optimizer={"schedule": "constant"}))
    return run


def resumed(stopped: Path, tmp_path: Path, **changes) -> Path:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    before = Run.open(run).experiment
    optimizer = dataclasses.replace(before.optimizer, **changes.pop("optimizer", {}))
    train(dataclasses.replace(before, optimizer=optimizer, **{"steps": 9} | changes), resume=run)
    return run


@pytest.mark.slow
def test_clipping_decay_rates_and_masking_change(stopped, tmp_path):
    rule = {"clip_norm": None, "weight_decay": 0.0, "layer_decay": 0.5, "b2": 0.9}
    run = resumed(stopped, tmp_path, optimizer=rule, text_masking=0.25, dtype="bfloat16")
    assert len(losses(run)) == 9
    changes = read_history(as_path(run))[-1]["changes"]
    assert changes["optimizer.clip_norm"] == [1.0, None]
    assert changes["text_masking"] == [0.0, 0.25]
    text = Run.open(run).history_text()
    assert "resumed at step 6 of 9 on 8 x cpu" in text
    assert "\n    optimizer.weight_decay: 0.1 -> 0.0\n" in text
    back = {"clip_norm": 1.0, "weight_decay": 0.1, "layer_decay": 1.0}
    again = resumed(run, tmp_path / "again", optimizer=back, steps=10)
    assert len(losses(again)) == 10


@pytest.mark.slow
def test_a_batch_size_changes_the_steps_of_a_length_in_examples(stopped, tmp_path):
    # Six steps of 16 are 96 examples: the other 64 are eight steps of 8.
    run = resumed(stopped, tmp_path, steps=None, examples=160, batch_size=8)
    row = read_history(as_path(run))[-1]
    assert (row["step"], row["total_steps"]) == (6, 14)
    assert row["data"] == "continues at step 6 (changed: --batch-size)"


@pytest.mark.slow
def test_a_vocabulary_may_move_and_not_change(stopped, tmp_path, tiny):
    run = tmp_path / "run"
    vocabulary = stopped / "tokenizer" / "tokenizer.json"
    named = tiny(run_dir=str(run), steps=2, tokenizer_file=str(vocabulary))
    train(named)
    moved, other = tmp_path / "moved.json", tmp_path / "other.json"
    shutil.copy(vocabulary, moved)
    train_bpe(["quite another text"], 262, 16).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "tokenizer.json", other)
    with pytest.raises(ConfigError, match="has another vocabulary than the run"):
        train(dataclasses.replace(named, tokenizer_file=str(other)), resume=run)
    train(dataclasses.replace(named, tokenizer_file=str(moved), run_dir=str(run)), resume=run)
    assert list(read_history(as_path(run))[-1]["changes"]) == ["tokenizer_file"]


@pytest.mark.slow
def test_a_truncated_row_of_the_history_hides_no_others(stopped, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    with (run / "history.jsonl").open("a") as file:
        file.write('{"time": "2026-')
    opened = Run.open(run)
    assert len(opened.starts()) == 1
    opened.record_start(1, 2)
    assert [row["step"] for row in opened.starts()] == [0, 1]
    with (run / "history.jsonl").open("a") as file:
        file.write('{"time": "2026-\n' + json.dumps(opened.starts()[0]) + "\n")
    assert len(opened.starts()) == 3


@pytest.mark.slow
def test_a_config_that_changed_without_a_row_of_the_history_counts(stopped, tmp_path):
    """A start that was killed while it recorded a new length; or an edit by hand."""
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    assert not Run.open(run).edited
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"steps": config["steps"] + 2}))
    assert Run.open(run).edited
    assert train(resume=run).total_steps == config["steps"] + 2
    assert not Run.open(run).edited


@pytest.mark.slow
def test_the_config_of_a_resumed_run_is_read_once(stopped, tmp_path, monkeypatch):
    from vlm.training import run as module

    calls, read = [], module.experiment_in
    monkeypatch.setattr(module, "experiment_in", lambda f: calls.append(f) or read(f))
    resumed_run = tmp_path / "run"
    shutil.copytree(stopped, resumed_run)
    train(resume=resumed_run)
    assert len(calls) == 1


def wrong_loss(inputs):
    return inputs.z_image  # no scalar


@pytest.mark.slow
@pytest.mark.untyped
def test_a_refused_loss_leaves_no_folder(tiny, tmp_path):
    with pytest.raises(ConfigError, match="wrong_loss returned an array"):
        train(tiny(run_dir=str(tmp_path / "run")), loss=wrong_loss)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_with_a_timescale_goes_on_without_a_jump(tiny, tmp_path):
    run = tmp_path / "run"
    rule = {"schedule": "rsqrt", "timescale": 2, "warmup": None, "cooldown": 0.0}
    train(tiny(run_dir=str(run), steps=6, log_every=1, optimizer=rule))
    longer = tiny(steps=9, log_every=1, optimizer=rule, run_dir=str(run))
    train(longer, resume=run)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    rates = [row["learning_rate"] for row in rows if "learning_rate" in row]
    steps = np.arange(9)
    expected = 1e-3 * np.minimum(steps / 2, np.sqrt(2 / np.maximum(steps, 2)))
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


# ------------------------------------------------------------------------------- real processes


@pytest.fixture(scope="module")
def half_broken(drawings, tmp_path_factory) -> str:
    """The drawings, with every other file cut off."""
    folder = tmp_path_factory.mktemp("broken") / "drawings"
    shutil.copytree(drawings, folder)
    for file in sorted(folder.glob("*.png"))[::2]:
        file.write_bytes(file.read_bytes()[:40])
    return str(folder)


@pytest.mark.slow
def test_a_run_that_stopped_for_bad_samples_is_repaired(tiny, half_broken, tmp_path):
    experiment = tiny(steps=24, checkpoint_every=0.1, log_every=1, data={"source": half_broken})
    config = write_config(experiment, tmp_path / "config.json")
    run, log, env = tmp_path / "run", tmp_path / "log", environment()
    stopped = wait(start([config, "--run-dir", run], env, log), log, 1)
    assert "more than the 5.0% of data.max_bad_share" in stopped
    assert 0 < len(losses(run)) < 24
    fixed = ["--data.max-bad-share", "0.9"]
    output = wait(start(["--resume", run, *fixed], env, log), log)
    assert "data.max_bad_share is 0.9 from now on; it was 0.05" in output
    assert len(losses(run)) == 24
    row = read_history(as_path(run))[-1]
    assert row["changes"] == {"data.max_bad_share": [0.05, 0.9]}
    assert 0 < row["step"] < 24
    assert (run / "bundle").exists()


@pytest.mark.slow
def test_two_processes_change_the_batch_size_as_one_does(tiny, tmp_path):
    experiment = tiny(steps=4, log_every=1)
    config = write_config(experiment, tmp_path / "config.json")
    run, one = tmp_path / "run", tmp_path / "one"
    Pair([config, "--run-dir", run], tmp_path).wait()
    shutil.copytree(run, one)
    changes = ["--batch-size", "8", "--steps", "8", "--optimizer.clip-norm", "None"]
    output = Pair(["--resume", run, *changes], tmp_path).wait()
    assert "the data continues at step 4 (changed: --batch-size)" in output[0]
    wait(start(["--resume", one, *changes], environment(8), tmp_path / "log"), tmp_path / "log")
    np.testing.assert_allclose(losses(run), losses(one), rtol=1e-5)
    assert len(losses(run)) == 8
