"""Phases of a run: what changes, exactness over kills, and phases that are refused."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import environment, losses, send_at, start, wait, weights, write_config
from test_hosts import Pair

from vlm.bundle import load
from vlm.config import AugmentConfig, Experiment, FieldFilter, MixturePart, Phase, in_phase
from vlm.errors import ConfigError
from vlm.paths import as_path
from vlm.training.history import read_history
from vlm.training.loop import steps, train
from vlm.training.optimizer import learning_rate
from vlm.training.run import Run
from vlm.training.schedule import phase_starts

SMALL = {"model.vision.image_size": 8, "preprocess.image_size": 8}
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
    assert [(row.get("phase", 0), row["step"]) for row in history] == [(0, 0), (1, 4), (2, 8), (3, 10)]
    assert history[1]["changes"]["batch_size"] == [16, 8]
    assert history[1]["data"] == "continues at step 4 (changed: --batch-size)"
    assert history[2]["data"].startswith("starts a new pass at step 8")
    text = Run.open(whole).history_text()
    assert "phase 1 from step 4 of 13" in text
    assert "model.vision.image_size: 8 -> 16" in text
    assert sorted(os.listdir(whole / "checkpoints"), key=int) == ["4", "8", "10", "13"]
    assert load(whole).config.vision.image_size == 16
    # Frozen parameters keep the value of step 10: without EMA they are those of the model.
    rates = [row["learning_rate"] for row in rows_of(whole)]
    assert rates[8] == 0  # the schedule has started again, with its warm-up


@pytest.mark.parametrize("step", [4, 8, 10])
def test_a_run_that_stopped_at_a_phase_resumes_to_the_same_weights(whole, tmp_path, step):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "bundle")
    for later in os.listdir(run / "checkpoints"):
        if int(later) > step:
            shutil.rmtree(run / "checkpoints" / later)
    train(resume=run)
    assert weights(run) == weights(whole)
    assert losses(run) == losses(whole)
