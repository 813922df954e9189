"""What the options of `vlm train` make of a config."""

import re
from pathlib import Path

import pytest
import tiny

import vlm
from vlm.cli import elastic, train
from vlm.cli.train import experiment_of
from vlm.errors import VlmError

CONFIG = tiny.folder() / "shapes.py"  # of 40 steps


@pytest.mark.parametrize(
    "options", [["--epochs", "2"], ["--epochs=2"], ["--batch-size", "4", "--epochs", "2"]]
)
def test_a_length_on_the_command_line_replaces_the_configs(options):
    made = experiment_of([str(CONFIG), *options])
    assert (made.steps, made.epochs) == (None, 2.0)


def test_other_options_leave_the_length():
    assert experiment_of([str(CONFIG), "--batch-size", "4"]).steps == 40


@pytest.mark.parametrize(
    ("options", "scan"),
    [([], None), (["--scan"], True), (["--no-scan"], False), (["--scan=True"], True)],
)
def test_a_flag_may_be_unset(options, scan):
    assert experiment_of([str(CONFIG), *options]).scan is scan


# ------------------------------------------------------------------------- starting models

CLIP = str(Path(__file__).parents[1] / "weights/golden/hf_clip")


def test_a_model_needs_no_config():
    theirs = vlm.load(CLIP)
    made = experiment_of(["--init-from", CLIP, "--data.source", "photos.csv", "--batch-size", "4"])
    assert made.model == theirs.config
    assert made.preprocess == theirs.preprocess.config
    assert made.tokenizer == theirs.tokenizer.config
    assert (made.init_from, made.name, made.data.source) == (
        CLIP,
        "hf_clip-finetuned",
        "photos.csv",
    )
    assert made.optimizer.learning_rate is None  # chosen last, by the batch that was named


@pytest.mark.parametrize("name", ["--preprocess.image-size", "--init-image-size"])
def test_one_size_is_enough(name):
    size = 2 * vlm.load(CLIP).config.vision.image_size
    made = experiment_of(["--init-from", CLIP, name, str(size), "--tokenizer.context-length=9"])
    assert made.model.vision.image_size == made.preprocess.image_size == size
    assert made.model.text.context_length == made.tokenizer.context_length == 9


def test_a_config_without_a_model_takes_the_models(tmp_path):
    config = tmp_path / "mine.py"
    config.write_text("from vlm.config import *\nconfig = Experiment(steps=3, batch_size=8)\n")
    made = experiment_of([str(config), "--init-from", CLIP])
    assert (made.model, made.steps) == (vlm.load(CLIP).config, 3)
    assert experiment_of([str(CONFIG), "--init-from", CLIP]).model.embed_dim == 16  # it has its own


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "3"], "or give a model with --init-from"),
        (["--init-from"], "--init-from needs a value"),
        (["--init-from", CLIP, "--init-image-size", "big"], "takes a number, not 'big'"),
        (["--init-from", "gone"], "there is no model 'gone'"),
        (["--init-from", CLIP, "--init-towers", "all"], "init_towers is 'all': choose one of"),
    ],
)
def test_a_start_that_cannot_be_is_one_sentence(args, message):
    with pytest.raises(VlmError, match=message):
        experiment_of(args)


def test_a_part_that_needs_a_value_is_complete_with_its_options():
    made = experiment_of([str(CONFIG), "--distill.teacher", "ViT-L-14/"])
    assert made.distill.teacher == "ViT-L-14/"
    with pytest.raises(VlmError, match="distill needs exactly one teacher"):
        experiment_of([str(CONFIG), "--distill.features", "0.5"])


# ------------------------------------------------------------------------------------- phases


def test_phases_are_json_or_a_file_of_it(tmp_path):
    text = '[{"fraction": 0.5, "changes": {"text-masking": 0.1, "batch_size": 64}}]'
    (tmp_path / "phases.json").write_text(text)
    for given in (text, str(tmp_path / "phases.json")):
        made = experiment_of(["openmoji", "--phases", given])
        assert dict(made.phases[0].changes) == {"text_masking": 0.1, "batch_size": 64}
    assert experiment_of(["openmoji", "--phases", "[]"]).phases == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nofile.json", "'nofile.json' is no JSON list and no file of one: No such file"),
        ("[{", "is no JSON list and no file of one: Expecting property name"),
        ('[{"step": 5, "changes": {"batch_sizes": 3}}]', "no field 'batch_sizes': did you mean"),
        ('[{"changes": {"batch_size": 3}}]', "give one of step, fraction and examples"),
        ('[{"stp": 3}]', "Experiment.phases has no field 'stp'"),
        ("[3]", "must be an object of fields, not 3"),
    ],
)
def test_wrong_phases_are_one_sentence(given, message):
    with pytest.raises(VlmError, match=re.escape(message)) as caught:
        experiment_of(["openmoji", "--phases", given])
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------- elastic runs


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([str(CONFIG), "--processes", "4:2"], "--processes 4:2 has no numbers from MIN to MAX"),
        ([str(CONFIG), "--processes", "2:x"], "--processes takes a number, not '2:x'"),
        ([str(CONFIG), "--processes", "2:4"], "--processes 2:4 needs a --process-id from 0 to 3"),
        ([str(CONFIG), "--processes=2:4", "--process-id=4"], "to 3, .* and has 4: give"),
        (
            [str(CONFIG), "--processes=2:4", "--process-id=0", "--coordinator=h:1"],
            "--coordinator does not fit --processes MIN:MAX",
        ),
        ([str(CONFIG), "--processes=2:4", "--process-id=0"], "an elastic run needs a --run-dir"),
        ([str(CONFIG), "--max-restarts", "5"], "--max-restarts is for elastic runs"),
    ],
)
def test_wrong_options_of_an_elastic_run_are_one_sentence(args, message, monkeypatch):
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    with pytest.raises(VlmError, match=message):
        train.main(args)


def test_an_elastic_run_continues_only_by_the_command_that_started_it(tmp_path):
    run = tmp_path / "run"
    args = [str(CONFIG), "--run-dir", str(run)]
    (run / "elastic").mkdir(parents=True)
    elastic._check_command(args, str(run))
    (run / "config.json").write_text("{}")
    elastic._check_command(args, str(run))
    with pytest.raises(VlmError, match=r"already holds a run, by vlm train .*: resume it with"):
        elastic._check_command([*args, "--epochs", "3"], str(run))
    (run / "elastic" / "command.json").unlink()
    with pytest.raises(VlmError, match=r"already holds a run: resume it with vlm train --resume"):
        elastic._check_command(args, str(run))
