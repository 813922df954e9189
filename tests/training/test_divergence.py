"""Runs that diverge on bad data: found, rolled back past it, or stopped; also over processes.

The training data is in its own order. Some of its batches are dark noise, on which the loss is
thousands of times larger. The first pixel of an image is the number of its batch, which the loss
logs: so the log shows which batches a run has been trained on.
"""

import dataclasses
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from processes import environment, losses, send_at, start, wait, weights, write_config
from test_hosts import Pair

import vlm
from vlm.config import AugmentConfig, DivergenceConfig, LocalCheckpointConfig
from vlm.data.pipeline import train_batches
from vlm.errors import ConfigError
from vlm.inputs.preprocess import Preprocess
from vlm.paths import as_path
from vlm.training.divergence import DivergenceMonitor
from vlm.training.history import history_text, read_history
from vlm.training.loop import train
from vlm.training.rollback import data_after
from vlm.training.start import tokenizer_of

MODULE = """\
import json, os, pathlib, signal
import grain
import jax.numpy as jnp
import numpy as np
from PIL import Image
import vlm
from vlm.training.checkpoint import Checkpoints

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 70, 220)}
BAD = [range(*pair) for pair in json.loads(os.environ.get("BAD", "[[30, 35]]"))]
FACTOR = float(os.environ.get("FACTOR", "1e4"))

class Pictures:
    def __len__(self):
        return 16 * 250

    def __getitem__(self, i):
        batch, (name, rgb) = i // 16, list(COLOURS.items())[i % 3]
        pixels = np.full((16, 16, 3), 255, np.uint8)
        pixels[4:12, 4:12] = rgb
        if any(batch in bad for bad in BAD):
            pixels = np.random.default_rng(i).integers(0, 60, (16, 16, 3)).astype(np.uint8)
        pixels[0, 0] = batch
        return {"image": Image.fromarray(pixels), "caption": f"a {name} square"}

def data(split):
    return grain.MapDataset.source(Pictures())

def bad(inputs):
    images = inputs.batch["images"].astype(jnp.float32)
    dark = (images.mean((1, 2, 3)) < 100).mean()
    cosine = (inputs.z_image * inputs.z_text).sum(1).mean()
    factor = jnp.where(dark > 0, FACTOR, 0.0)
    return factor * (2 + cosine), {"batch": images[:, 0, 0, 0].max()}

KILL = os.environ.get("KILL")

def kill(checkpoints, *arguments):
    if (checkpoints.folder.parent / "rollback.json").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return ORIGINAL(checkpoints, *arguments)

if KILL in ("delete", "restore"):  # in the middle of a rollback
    ORIGINAL = getattr(Checkpoints, KILL)
    setattr(Checkpoints, KILL, kill)

class Alarm(vlm.callbacks.Callback):
    def on_start(self, run):
        self.file = pathlib.Path(run.folder) / "alarm.txt"

    def on_divergence(self, divergence):
        if KILL == "alert":
            os.kill(os.getpid(), signal.SIGKILL)
        with self.file.open("a") as file:
            file.write(f"{divergence.action} {divergence.to_step}: {divergence.message}\\n")
"""

ROLL_BACK = DivergenceConfig(action="roll_back", window=16, in_a_row=3)


@pytest.fixture(scope="module")
def bad(tiny, tmp_path_factory):
    """`bad(run, **changes)`: an experiment of 60 steps; batches 30 to 34 of its data are bad."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "bad_data.py").write_text(MODULE)
    still = AugmentConfig(crop=(1.0, 1.0), jitter=0.0)

    def build(run: Path, **changes):
        settings = {
            "run_dir": str(run),
            "steps": 60,
            "log_every": 1,
            "checkpoint_every": 0.2,
            "losses": {"sigmoid": 1.0, "bad_data:bad": 1.0},
            "callbacks": ("bad_data:Alarm",),
            "divergence": ROLL_BACK,
        }
        return tiny(
            data={"source": "python:bad_data:data", "augment": still}, **(settings | changes)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", f"{folder}:{Path(vlm.__file__).parents[1]}")
        yield build


def batches(run) -> list[int]:
    """Return the number of the batch of each step, from the log."""
    rows = map(json.loads, (Path(run) / "log.jsonl").read_text().splitlines())
    return [round(row["loss/bad/batch"]) for row in rows if "loss" in row]


def rollbacks(run) -> list[dict]:
    rows = read_history(as_path(run))
    return [{"to": r["step"], **r["rollback"]} for r in rows if "rollback" in r]


def run_process(experiment, tmp_path, code=0, **env: str) -> str:
    config, log = write_config(experiment, tmp_path / "config.json"), tmp_path / "log"
    return wait(start([config], environment(**env), log), log, code)


# -------------------------------------------------------------------------------- the monitor


def monitor_of(action="roll_back", **options) -> DivergenceMonitor:
    return DivergenceMonitor(DivergenceConfig(action=action, **options))


def feed(monitor: DivergenceMonitor, losses, norms=None, input_size=lambda step: "") -> list[int]:
    """Return the steps at which a divergence is found; the monitor is cleared after each."""
    found = []
    norms = np.ones(len(losses)) if norms is None else norms
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1):
        finite = bool(np.isfinite(loss + norm))
        monitor.add(step, float(loss), float(norm), finite, input_size(step))
        if monitor.diverged:
            found.append(step)
            monitor.clear()
    return found


def test_outliers_are_those_of_an_independent_statistic():
    rng = np.random.default_rng(0)
    before = rng.gamma(2.0, size=128)
    median = np.median(before)
    limit = median + 6 * scipy.stats.median_abs_deviation(before, scale="normal")
    for loss, outlier in ((limit * 0.999, False), (limit * 1.001, True)):
        monitor = monitor_of(action="warn")
        assert not feed(monitor, [*before, loss])
        assert (monitor.first == 129) is outlier


def test_normal_training_is_no_divergence():
    rng = np.random.default_rng(0)
    falling = 8 * np.exp(-np.arange(5000) / 500) + 0.3 + 0.1 * rng.standard_normal(5000)
    assert not feed(monitor_of(), falling, np.exp(rng.standard_normal(5000)))
    single = falling.copy()
    single[1000::20] += 50  # one step at a time
    assert not feed(monitor_of(), single)
    norms = np.where(np.arange(5000) > 2000, 100.0, 1.0)  # the model starts to learn
    learns = np.where(np.arange(5000) > 2000, 4.0, 5.0)
    assert not feed(monitor_of(), learns, norms)


def test_a_spike_is_found_after_so_many_outliers():
    rng = np.random.default_rng(0)
    losses = 2 + 0.1 * rng.standard_normal(400)
    assert feed(monitor_of(in_a_row=8), losses + 1.0 * (np.arange(400) >= 200)) == [208]
    norms = np.where(np.arange(400) >= 300, 50.0, 1.0)
    rises = losses + np.where(np.arange(400) >= 300, 0.3, 0.0)  # less than a spike of the loss
    assert feed(monitor_of(in_a_row=2), rises, norms) == [302]
    losses[300:302] = np.nan
    assert feed(monitor_of(in_a_row=2), losses) == [302]


def test_a_monitor_continues_from_its_state():
    rng = np.random.default_rng(0)
    losses = 2 + 0.1 * rng.standard_normal(300)
    losses[200:] += 3
    whole, first = monitor_of(), monitor_of()
    for monitor in (whole, first):
        feed(monitor, losses[:204])
    second = monitor_of()
    second.restore(json.loads(json.dumps(first.state())))
    for monitor in (whole, second):
        for step in range(204, 208):
            monitor.add(step + 1, float(losses[step]), 1.0, True)
    assert second.state() == whole.state()
    assert second.diverged


def test_steps_are_compared_with_those_of_the_same_image_size():
    monitor = monitor_of(window=16, in_a_row=2)
    losses = [1.0] * 50 + [5.0] * 50
    assert not feed(monitor, losses, input_size=lambda step: "8" if step <= 50 else "16")


def test_each_batch_size_has_its_own_window():
    """The loss of a larger batch is higher; a spike of the smaller one is below it."""
    rng = np.random.default_rng(0)
    losses = np.where(np.arange(200) % 4, 2.0, 5.0) + 0.01 * rng.standard_normal(200)
    losses[160:] += 1
    monitor = monitor_of(window=16, in_a_row=2)
    sizes = ["256", "64", "64", "64"] * 50
    assert feed(monitor, losses, input_size=lambda step: sizes[step - 1]) == [162]
    again = monitor_of(window=16, in_a_row=2)
    again.restore(json.loads(json.dumps(monitor.state())))
    assert again.state() == monitor.state()


def test_a_state_of_other_settings_leaves_only_the_budget():
    config = DivergenceConfig(action="roll_back", window=16, in_a_row=2)
    monitor = DivergenceMonitor(config, "batch_size 8")
    monitor.rollbacks, monitor.skipped = 2, 30
    for step, loss in enumerate([1.0] * 16 + [9.0] * 2, 1):
        monitor.add(step, loss, 1.0, True)
    assert monitor.diverged
    saved = json.loads(json.dumps(monitor.state()))
    other = DivergenceMonitor(config, "batch_size 16")
    other.restore(saved)
    assert (other.diverged, other.first, other.rollbacks, other.skipped) == (None, None, 2, 30)
    assert not feed(other, [5.0] * 16)
    warns = DivergenceMonitor(DivergenceConfig(window=16, in_a_row=2), "batch_size 8")
    warns.restore(saved)
    assert warns.diverged is None
    assert feed(warns, [9.0] * 2) == [2]


def test_a_rollback_needs_two_checkpoints(bad, tmp_path):
    with pytest.raises(ConfigError, match="keep_checkpoints 1 may leave only one"):
        bad(tmp_path, keep_checkpoints=1)
    with pytest.raises(ConfigError, match=r"in_a_row 9 is more than half of divergence\.window 16"):
        DivergenceConfig(window=16, in_a_row=9)


# ----------------------------------------------------------------------------------- the data


@pytest.mark.parametrize("kind", ["random", "stream"])
def test_data_goes_on_where_it_was(tiny, bad, tmp_path, kind):
    experiment = tiny() if kind == "random" else bad(tmp_path)
    preprocess, tokenizer = Preprocess(experiment.preprocess), tokenizer_of(tiny())

    def read():
        return train_batches(experiment.data, preprocess, tokenizer, batch_size=8, seed=3)

    reader = read()
    for _ in range(7):
        next(reader)
    reached = json.loads(json.dumps(reader.get_state()))
    expected = next(reader)
    reader.close()
    back = read()
    for _ in range(2):
        next(back)
    own = json.loads(json.dumps(back.get_state()))
    back.close()
    back.resume(own | data_after(reached))
    assert back.step == 2
    assert back.samples == 16
    np.testing.assert_array_equal(next(back)["images"], expected["images"])
    state = back.get_state()
    back.close()
    assert state["step"] == 3


# ------------------------------------------------------------------------------ real processes


@pytest.fixture(scope="module")
def rolled_back(bad, tmp_path_factory):
    """A run in a process of its own that was rolled back once, and its output."""
    folder = tmp_path_factory.mktemp("rolled-back")
    return folder / "run", run_process(bad(folder / "run"), folder)


@pytest.mark.first_tier
def test_a_run_returns_to_the_last_good_checkpoint_and_skips_the_bad_data(rolled_back):
    run, output = rolled_back
    (row,) = rollbacks(run)
    assert (row["to"], row["left"], row["skipped"], row["rollbacks"]) == (24, 35, 11, 1)
    assert "the training diverges at steps 31 to 33: loss 1.99" in row["reason"]
    assert f"{row['reason']}; the run returns to step 24 and skips the 11 batches up to" in output
    assert batches(run) == [*range(24), *range(35, 71)]
    assert max(losses(run)[30:]) < 10
    assert (run / "bundle").exists()
    (line,) = (run / "alarm.txt").read_text().splitlines()
    assert line == f"roll_back 24: {row['reason']}"
    assert "rollback 1 from 35 to step 24 of 60" in history_text(read_history(as_path(run)))


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_a_rollback_ends_the_same(bad, rolled_back, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    config = write_config(bad(run), tmp_path / "config.json")
    arguments = [config]
    for moment in ("alert", "delete", "restore"):
        wait(start(arguments, environment(KILL=moment), log), log, -signal.SIGKILL)
        arguments = ["--resume", run]
        written = moment != "alert"
        assert (run / "rollback.json").exists() == written
        if written:
            pending = json.loads((run / "rollback.json").read_text())["pending"]
            assert pending == (moment == "delete")
    wait(start(arguments, environment(), log), log)
    assert len(rollbacks(run)) == 1
    assert batches(run) == batches(rolled_back[0])
    assert weights(run) == weights(rolled_back[0])


@pytest.mark.slow
def test_a_rollback_leaves_local_checkpoints_behind(bad, rolled_back, tmp_path):
    """A run killed before it or in the middle of it returns to step 24, though some are newer."""
    run, log = tmp_path / "run", tmp_path / "log"
    local = LocalCheckpointConfig(str(tmp_path / "disk"), every=5)
    arguments = [write_config(bad(run, local_checkpoints=local), tmp_path / "config.json")]
    for moment in ("alert", "delete"):
        wait(start(arguments, environment(KILL=moment), log), log, -signal.SIGKILL)
        arguments = ["--resume", run]
    assert "starting from the local checkpoint of step 3" in " ".join(log.read_text().split())
    process = start(arguments, environment(), log)
    send_at(signal.SIGKILL, 43, run, [process])
    output = " ".join(wait(process, log, -signal.SIGKILL).split())
    assert "step 30 is not used: the run has gone back to step 24 since" in output
    assert "no local checkpoint is newer than that of step 24 of the run folder" in output
    wait(start(arguments, environment(), log), log)
    assert len(rollbacks(run)) == 1
    assert batches(run) == batches(rolled_back[0])
    assert weights(run) == weights(rolled_back[0])


@pytest.mark.slow
def test_two_processes_roll_back_together(bad, rolled_back, tmp_path):
    run = tmp_path / "run"
    outputs = Pair([write_config(bad(run), tmp_path / "config.json")], tmp_path).wait()
    assert "the run returns to step 24" in outputs[0]
    assert [row["to"] for row in rollbacks(run)] == [24]
    assert batches(run) == batches(rolled_back[0])
    np.testing.assert_allclose(losses(run), losses(rolled_back[0]), rtol=1e-4)


@pytest.mark.slow
def test_two_processes_stop_together_after_a_rollback(bad, tmp_path):
    """Checkpoints are written all the time, and Orbax does not ask JAX with their steps."""
    run = tmp_path / "run"
    experiment = bad(run, steps=200, checkpoint_every=0.005, keep_checkpoints=30)
    pair = Pair([write_config(experiment, tmp_path / "config.json")], tmp_path)
    while not rollbacks(run):
        assert pair.processes[0].poll() is None
        time.sleep(0.01)
    send_at(signal.SIGTERM, 45, run, pair.processes[1:])
    outputs = pair.wait()
    assert "stop requested: saving step" in outputs[0]
    assert f"resume with `vlm train --resume {run}`" in " ".join(outputs[0].split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_rollbacks": 1}, "1 rollbacks (divergence.max_rollbacks) are used up"),
        ({"max_skipped": 0.2}, "and at most 12 may be skipped (divergence.max_skipped)"),
    ],
)
def test_a_run_whose_budget_is_exhausted_exits_with_an_error(bad, tmp_path, changes, message):
    run = tmp_path / "run"
    experiment = bad(run, divergence=dataclasses.replace(ROLL_BACK, **changes))
    output = run_process(experiment, tmp_path, code=1, BAD="[[30, 200]]")
    assert message in output.splitlines()[-1]
    assert "Traceback" not in output
    assert len(rollbacks(run)) == 1
    alarms = (run / "alarm.txt").read_text().splitlines()
    assert [line.split()[0] for line in alarms] == ["roll_back", "stop"]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_rolled_back_or_an_error(bad, tmp_path):
    run = tmp_path / "run"
    warn = bad(run, divergence=DivergenceConfig(window=16, in_a_row=3))
    output = run_process(warn, tmp_path, code=1, FACTOR="nan")
    assert "the loss or its gradient was not finite at step" in output
    log = tmp_path / "log"
    options = ["--resume", run, "--divergence.action", "roll_back"]
    wait(start(options, environment(FACTOR="nan"), log), log)
    (row,) = rollbacks(run)
    assert "at steps 31 to 33: the loss or its gradient is not finite" in row["reason"]
    assert batches(run) == [*range(24), *range(35, 71)]
    assert np.isfinite(losses(run)).all()


# --------------------------------------------------------------------------------- one process


@pytest.mark.untyped  # fields that take objects hold their import paths
def test_warnings_change_no_bit(bad, tmp_path):
    off, warn = tmp_path / "off", tmp_path / "warn"
    train(bad(off, divergence=DivergenceConfig(action="off")))
    train(bad(warn, divergence=DivergenceConfig(window=16, in_a_row=3)))
    assert weights(off) == weights(warn)
    assert losses(off) == losses(warn)
    assert not (off / "alarm.txt").exists()
    assert (warn / "alarm.txt").read_text().startswith("warn None: the training diverges at steps")


@pytest.mark.untyped
def test_a_rollback_to_the_begin_of_a_phase_begins_it_again(bad, tmp_path):
    phase = vlm.config.Phase({"optimizer.learning_rate": 5e-4}, step=10)
    run = tmp_path / "run"
    train(bad(run, phases=(phase,), checkpoint_every=1.0))
    assert [row["to"] for row in rollbacks(run)] == [10]
    assert batches(run) == [*range(10), *range(35, 85)]


@pytest.mark.slow
@pytest.mark.untyped
def test_a_resumed_run_with_another_loss_does_not_diverge(bad, tmp_path):
    run = tmp_path / "run"
    config = DivergenceConfig(window=16, in_a_row=3)
    experiment = bad(run, losses={"sigmoid": 1.0}, steps=30, divergence=config)
    with vlm.steps(experiment) as loop:
        for state, _ in loop:
            if int(state.step) == 20:
                break
    other = dataclasses.replace(experiment, losses={"sigmoid": 100.0})
    train(other, resume=run)
    assert min(losses(run)[20:]) > 10 * max(losses(run)[:20])
    assert not (run / "alarm.txt").exists()


@pytest.mark.slow
@pytest.mark.untyped
def test_an_unchanged_run_is_compared_with_the_steps_before_its_resume(bad, tmp_path, capsys):
    run = tmp_path / "run"
    with vlm.steps(bad(run)) as loop:
        for state, _ in loop:
            if int(state.step) == 24:
                break
    train(resume=run)
    (row,) = rollbacks(run)
    assert (row["to"], row["left"]) == (24, 35)
    assert capsys.readouterr().err.count("first step after") == 2  # once for each start
