"""Phases of a run: what changes, exactness over kills, and phases that are refused."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from processes import environment, losses, send_at, start, wait, weights, write_config
from test_hosts import Pair

from vlm.bundle import load
from vlm.cluster import watch
from vlm.config import FieldFilter, MeshConfig, MixturePart, Phase
from vlm.errors import ConfigError
from vlm.paths import as_path
from vlm.sharding import make_mesh
from vlm.training.carry_over import carried_over
from vlm.training.history import read_history
from vlm.training.loop import steps, train
from vlm.training.optimizer import learning_rate
from vlm.training.resolution import resampled
from vlm.training.run import Run
from vlm.training.schedule import check_starts, phase_starts, steps_to
from vlm.training.step import Trainer

FULL = {"model.vision.image_size": 16, "preprocess.image_size": 16}


def rows_of(run: Path | str) -> list[dict]:
    lines = (Path(run) / "log.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


@pytest.fixture(scope="module")
def recipe(tiny):
    """A run of four phases: small images and masked texts, large images, other data, frozen."""
    phases = (
        Phase({**FULL, "text_masking": 0.0, "batch_size": 8}, step=4),
        Phase(
            {
                "data.source": "",
                "data.mixture": [MixturePart(tiny().data.source, weight=2.0)],
                "optimizer.learning_rate": 5e-4,
                "optimizer.clip_norm": None,
                "model.vision.patch_dropout": 0.5,
            },
            step=8,
            restart_schedule=True,
        ),
        Phase({"freeze": ["vision/.*"], "data.augment.flip": True}, step=10),
    )
    return tiny(
        vision={"image_size": 8, "dropout": 0.1},
        optimizer={"ema": 0.9},
        text_masking=0.5,
        phases=phases,
        log_every=1,
        steps=13,
        keep_checkpoints=9,
        checkpoint_every=1.0,
        checkpoint_minutes=None,
    )


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(dataclasses.replace(recipe, run_dir=str(run)))
    return run


def test_every_phase_trains_and_is_recorded(whole):
    assert [row["phase"] for row in rows_of(whole)] == [0] * 4 + [1] * 4 + [2] * 2 + [3] * 3
    history = read_history(as_path(whole))
    assert [(row.get("phase", 0), row["step"]) for row in history] == [
        (0, 0),
        (1, 4),
        (2, 8),
        (3, 10),
    ]
    assert history[1]["changes"]["batch_size"] == [16, 8]
    assert history[1]["data"] == "continues at step 4 (changed: --batch-size)"
    assert history[2]["data"].startswith("starts a new pass at step 8")
    text = Run.open(whole).history_text()
    assert "phase 1 from step 4 of 13" in text
    assert "model.vision.image_size: 8 -> 16" in text
    assert sorted(os.listdir(whole / "checkpoints"), key=int) == ["4", "8", "10", "13"]
    assert load(whole).config.vision.image_size == 16


@pytest.mark.parametrize("step", [4, pytest.param(8, marks=pytest.mark.slow), 10])
def test_a_run_that_stopped_at_a_phase_resumes_to_the_same_weights(whole, tmp_path, step):
    run = stopped(whole, tmp_path, step)
    train(resume=run)
    assert weights(run) == weights(whole)
    assert losses(run) == losses(whole)


def stopped(whole: Path, tmp_path: Path, step: int) -> Path:
    """The run as if it had been killed just after the checkpoint of `step`."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "bundle")
    for later in os.listdir(run / "checkpoints"):
        if int(later) > step:
            shutil.rmtree(run / "checkpoints" / later)
    return run


@pytest.mark.slow
def test_a_corrupt_checkpoint_of_a_phase_falls_back_to_the_phase_before(whole, tmp_path, capfd):
    run = stopped(whole, tmp_path, 10)
    for file in (run / "checkpoints" / "10" / "state").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            os.truncate(file, 10)
    train(resume=run)
    assert "checkpoint 10 of" in capfd.readouterr().err.replace("\n", " ")
    assert weights(run) == weights(whole)


@pytest.mark.slow
def test_later_phases_can_change_at_a_resume_and_earlier_ones_only_validly(whole, tmp_path):
    run = stopped(whole, tmp_path, 10)
    before = Run.open(run).experiment
    one, two, three = before.phases
    later = dataclasses.replace(three, changes={"text_masking": 0.25})
    other = dataclasses.replace(one, changes={**dict(one.changes), "freeze": ["text/.*"]})
    with pytest.raises(ConfigError, match=r"a resumed run cannot change --freeze \(\[\] to"):
        train(dataclasses.replace(before, phases=(other, two, later)), resume=run)
    with pytest.raises(ConfigError, match=r"--batch-size has no effect, since phase 1 of the run"):
        train(dataclasses.replace(before, batch_size=32), resume=run)
    with pytest.raises(ConfigError, match=r"has begun its phase 2, and --phases has 1: give the"):
        train(dataclasses.replace(before, phases=(one,)), resume=run)
    with pytest.raises(ConfigError, match=r"phase 2 has begun at .*, and --phases has one"):
        train(dataclasses.replace(before, phases=(one, three)), resume=run)
    train(dataclasses.replace(before, phases=(one, two, later), steps=14), resume=run)
    rows = read_history(as_path(run))
    assert rows[-2]["changes"]["steps"] == [13, 14]
    assert rows[-1]["changes"] == {"text_masking": [0.0, 0.25]}
    assert len(losses(run)) == 14


# ----------------------------------------------------------------------- real processes, with kills


@pytest.mark.slow
@pytest.mark.first_tier
def test_a_run_killed_around_its_phases_ends_bitwise_equal(recipe, tmp_path):
    env, log = environment(), tmp_path / "log"
    config = write_config(dataclasses.replace(recipe, checkpoint_every=0.15), tmp_path / "c.json")
    once, run = tmp_path / "once", tmp_path / "run"
    wait(start([config, "--run-dir", once], env, log), log)
    arguments = [config, "--run-dir", run]
    for step in (3, 4, 8, 9):  # before a phase, while its checkpoint is written, and after it
        process = start(arguments, env, log)
        send_at(signal.SIGKILL, step, run, [process])
        wait(process, log, -signal.SIGKILL)
        arguments = ["--resume", run]
    wait(start(arguments, env, log), log)
    assert weights(run) == weights(once)
    assert losses(run) == losses(once)


@pytest.mark.slow
def test_two_processes_change_the_phase_together(recipe, whole, tmp_path):
    config = write_config(recipe, tmp_path / "c.json")
    once, run = tmp_path / "once", tmp_path / "run"
    Pair([config, "--run-dir", once], tmp_path).wait()
    np.testing.assert_allclose(losses(once)[:8], losses(whole)[:8], rtol=1e-4)
    first = Pair([config, "--run-dir", run], tmp_path)
    send_at(signal.SIGKILL, 5, run, first.processes[1:])
    first.wait(watch.RETRY, -signal.SIGKILL)
    Pair(["--resume", run], tmp_path).wait()
    assert weights(run) == weights(once)
    assert losses(run) == losses(once)


# ------------------------------------------------------------------------------ the state of a run


def state_arrays(state) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def trainers(tiny):
    """A trainer of small images with a state after two steps of gradients, and its experiment."""
    mesh = make_mesh(MeshConfig())
    old = Trainer(tiny(vision={"image_size": 8}, optimizer={"ema": 0.9}), mesh)
    state = old.init(jax.numpy.int32(9))
    opt_state = jax.tree.map(lambda x: x + 1, state.opt_state)
    return old, dataclasses.replace(state, opt_state=opt_state)


def test_position_embeddings_and_their_averages_are_resampled(tiny, trainers):
    old, state = trainers
    large = tiny(optimizer={"ema": 0.9, "clip_norm": None})
    new = Trainer(large, old.mesh)
    after = carried_over(old, new, state)
    assert jax.tree.map(jax.numpy.shape, after) == jax.tree.map(jax.numpy.shape, new.abstract_state)
    position = after.params["vision"]["position"]
    np.testing.assert_allclose(
        position, resampled(state.params["vision"]["position"], 16), rtol=1e-6
    )
    np.testing.assert_array_equal(
        after.params["text"]["position"], state.params["text"]["position"]
    )
    for name in ("mu", "nu"):
        average = next(x for _, x in optax.tree.get_all_with_path(after.opt_state, name))
        assert (np.asarray(average["vision"]["position"]) == 1).all()
        assert (np.asarray(average["text"]["position"]) == 1).all()


def test_parameters_freeze_and_thaw(tiny, trainers):
    old, state = trainers
    shape = {"vision": {"image_size": 8}, "optimizer": {"ema": 0.9}}
    frozen = Trainer(tiny(freeze=("vision/.*",), **shape), old.mesh)
    held = carried_over(old, frozen, state)
    assert "vision" not in held.params
    assert held.frozen["vision"].keys() == state.params["vision"].keys()
    thawed = carried_over(frozen, old, held)
    for one, two in zip(state_arrays(thawed.params), state_arrays(state.params), strict=True):
        np.testing.assert_array_equal(one, two)
    mu = next(x for _, x in optax.tree.get_all_with_path(thawed.opt_state, "mu"))
    assert {float(x.max()) for x in jax.tree.leaves(mu["vision"])} == {0.0}
    assert {float(x.max()) for x in jax.tree.leaves(mu["text"])} == {1.0}
    count = next(x for _, x in optax.tree.get_all_with_path(thawed.opt_state, "count"))
    assert int(count) == 1


# -------------------------------------------------------------------------------- where they begin


def test_phases_begin_at_steps_fractions_and_examples(tiny):
    def begins(*phases, total, step=0, samples=0, **fields):
        e = tiny(phases=phases, **({"steps": None, "examples": 10**6} | fields))
        return phase_starts(e, total, step, samples)

    halved = {"batch_size": 8}
    assert begins(Phase(halved, step=7), total=100) == [7]
    two = Phase(halved, fraction=0.25), Phase({"text_masking": 0.1}, fraction=0.5)
    assert begins(*two, total=100) == [25, 50]
    assert begins(*two, total=100, step=30) == [30, 50]
    three = Phase(halved, examples=160), Phase({"text_masking": 0.1}, examples=200)
    assert begins(*three, total=100) == [10, 15]
    assert begins(*three, total=100, step=4, samples=100) == [8, 13]


def test_the_length_in_examples_counts_the_batches_of_each_phase(tiny):
    def length(*phases, examples):
        return steps_to(examples, tiny(steps=None, examples=examples, phases=phases), 0, 0)

    assert length(examples=167) == 10
    halved = {"batch_size": 8}
    assert length(Phase(halved, examples=160), examples=200) == 15
    assert length(Phase(halved, step=5), examples=160) == 15
    # A half of 20 steps of 16 examples, and a half of 8.
    assert length(Phase(halved, fraction=0.5), examples=240) == 20


def test_phases_of_no_length_are_refused(tiny):
    e = tiny(phases=(Phase({"batch_size": 8}, fraction=0.01),))
    with pytest.raises(ConfigError, match=r"phase of fraction 0.01 .* begins at step 0, where the"):
        check_starts(e, phase_starts(e, 12), 12, 0)
    late = tiny(steps=None, epochs=1.0, phases=(Phase({"batch_size": 8}, step=90),))
    with pytest.raises(ConfigError, match=r"begins at step 90, and the run has 50 steps: make the"):
        check_starts(late, phase_starts(late, 50), 50, 0)
    check_starts(e, [6], 12, 6)  # a resumed run whose phase begins at once


def test_a_schedule_runs_over_the_run_or_from_restart_to_restart(whole):
    found = [row["learning_rate"] for row in rows_of(whole)]
    config = Run.open(whole).experiment.optimizer
    first = [learning_rate(config, jax.numpy.float32(s / 8), 8) for s in range(8)]
    np.testing.assert_allclose(found[:8], first, rtol=1e-5)  # over the first two phases
    second = dataclasses.replace(config, learning_rate=5e-4)
    rest = [learning_rate(second, jax.numpy.float32(s / 5), 5) for s in range(5)]
    np.testing.assert_allclose(found[8:], rest, rtol=1e-5)


# ---------------------------------------------------------------------------------- before a step


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_size": 12},
            r"phase 1 \(step 5\): batch_size 12 does not divide over the 8 devices",
        ),
        ({"freeze": ["nothing/.*"]}, r"phase 1 \(step 5\): .*nothing/"),
        ({"freeze": [".*"]}, r"phase 1 \(step 5\): nothing is trained"),
        ({"data.source": ""}, "no data is named"),
        ({"data.source": "nowhere.csv"}, r"phase 1 \(step 5\): .*nowhere.csv"),
        ({"data.captions": ["title"]}, r"phase 1 \(step 5\): .* no .*'title'"),
        ({"data.eval_split": "later"}, r"phase 1 \(step 5\): .*later"),
    ],
    ids=["mesh", "no parameter", "all parameters", "no data", "no file", "no column", "no split"],
)
def test_a_phase_is_checked_before_the_first_step(tiny, tmp_path, changes, message):
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match=message):
        train(tiny(run_dir=str(run), phases=(Phase(changes, step=5),)))
    assert not run.exists()


@pytest.mark.slow
def test_a_run_is_evaluated_before_a_phase(tiny, tmp_path):
    phases = (Phase({"data.filters": [FieldFilter("caption", one_of=CAPTIONS)]}, step=3),)
    run = tmp_path / "run"
    e = tiny(run_dir=str(run), steps=5, eval_every=1.0, data={"eval_split": "test"}, phases=phases)
    with steps(dataclasses.replace(e, batch_size=8)) as loop:
        seen = [(int(state.step), loop.trainer.experiment.data.filters != ()) for state, _ in loop]
    assert seen == [(1, False), (2, False), (3, False), (4, True), (5, True)]
    rows = [json.loads(row) for row in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval/top1" in row] == [3]
    assert read_history(as_path(run))[1]["data"] == (
        "starts a new pass at step 3 (changed: --data.filters)"
    )


COLOURS = ("red", "green")
CAPTIONS = tuple(
    f"a {colour} {shape} at the {row} {column}"
    for colour in COLOURS
    for shape in ("bar", "square")
    for row in ("top", "middle", "bottom")
    for column in ("left", "right")
)
