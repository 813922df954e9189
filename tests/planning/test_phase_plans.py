"""Plans of the phases of a run."""

import dataclasses
import json

import pytest

from vlm.cli import main
from vlm.config import Experiment, ModelConfig, Phase, PreprocessConfig, TokenizerConfig
from vlm.errors import ConfigError
from vlm.planning import plan
from vlm.planning.phases import phase_experiments, whole_run

PHASES = (
    Phase({"model.vision.image_size": 256, "preprocess.image_size": 256}, examples=60_000),
    Phase({"batch_size": 512, "text_masking": 0.5}, examples=80_000),
)


def run(**fields) -> Experiment:
    parts = {"model": ModelConfig(), "preprocess": PreprocessConfig()}
    parts |= {"tokenizer": TokenizerConfig(), "phases": PHASES, "examples": 100_000}
    return Experiment(**(parts | fields))


def test_each_phase_is_a_run_of_its_own():
    parts = phase_experiments(run())
    # 59 steps of 1,024 to 60,416; 20 more to 80,896; and 37 of 512.
    assert [(part.steps, part.batch_size) for part in parts] == [(59, 1024), (20, 1024), (37, 512)]
    assert [part.model.vision.image_size for part in parts] == [224, 256, 256]
    assert {part.phases for part in parts} == {()}
    assert [part.steps for part in phase_experiments(run(examples=None, epochs=2.0))] == [None] * 3
    late = dataclasses.replace(PHASES[0], examples=None, step=99)
    short = run(phases=(late,))
    with pytest.raises(ConfigError, match=r"begins at step 99, and the run has 97 steps"):
        phase_experiments(short)


def test_times_and_costs_are_added():
    plans = [plan(part, "h100:8", compiled=False, loss=False) for part in phase_experiments(run())]
    total = whole_run(plans, 2.0)
    seconds = [planned.needs(2.0).seconds for planned in plans]
    assert total["seconds"] == [sum(s.low for s in seconds), sum(s.high for s in seconds)]
    assert total["cost"][0] == pytest.approx(total["seconds"][0] * 8 / 3600 * 2)
    assert plans[1].memory.peak > plans[0].memory.peak


def test_the_command_plans_every_phase(tmp_path, capsys):
    file = tmp_path / "phased.py"
    file.write_text(
        "import vlm\nfrom vlm.config import Phase\n"
        "config = vlm.Experiment(steps=10, phases=(Phase({'batch_size': 512}, step=4),))\n"
    )
    assert main(["plan", str(file), "--topology", "h100:8"]) == 0
    out = capsys.readouterr().out
    assert "phase 0 (4 steps from step 0)" in out
    assert "phase 1 (6 steps from step 4): --batch-size 512" in out
    assert "all phases: " in out
    assert main(["plan", str(file), "--topology", "h100:8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [part["batch_size"] for part in found["phases"]] == [1024, 512]
    assert set(found["all"]) == {"seconds"}
    assert main(["plan", str(file), "--topology", "h100:8", "--sweep"]) != 0
    assert "--sweep compares runs of one phase" in capsys.readouterr().err
