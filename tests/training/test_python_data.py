"""Runs on data sets that a user gives in Python: resumed exactly, by the object or its path."""

import dataclasses
import shutil

import pytest
import tiny
from processes import weights

from vlm.config import load_config
from vlm.data.sources import open_source
from vlm.errors import ConfigError, DataError
from vlm.training.loop import train

MODULE = """\
import grain
from vlm import DataConfig
from vlm.data import open_source

ROWS = open_source(DataConfig(source={folder!r}), "train")
rows = [dict(ROWS[i]) for i in range(len(ROWS))]

def make(split):
    if split == "test":
        return rows[:4]
    return grain.MapDataset.source(rows).shuffle(seed=1).repeat().to_iter_dataset()
"""


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    (tmp_path / "own_pictures.py").write_text(MODULE.format(folder=str(tiny.folder() / "data")))
    monkeypatch.syspath_prepend(tmp_path)
    config = load_config(tiny.folder() / "shapes.py")
    return dataclasses.replace(config, steps=6, checkpoint_every=0.5, eval_every=None)


def with_source(experiment, source, run_dir, **options):
    data = dataclasses.replace(experiment.data, source=source, **options)
    return dataclasses.replace(experiment, data=data, run_dir=str(run_dir))


def killed(run):
    """Remove what a run wrote after its checkpoint at half of its steps."""
    shutil.rmtree(run / "bundle")
    shutil.rmtree(run / "checkpoints" / "6")
    return run


@pytest.mark.slow
@pytest.mark.parametrize("form", ["a list", "a function by its path"])
def test_a_killed_run_ends_with_the_same_weights(experiment, tmp_path, form, caplog):
    if form == "a list":
        source = open_source(experiment.data, "train")
        source = [dict(source[i]) for i in range(len(source))]
    else:
        source = "python:own_pictures:make"
        vocabulary = str(tiny.run() / "tokenizer" / "tokenizer.json")
        experiment = dataclasses.replace(experiment, tokenizer_file=vocabulary)
    given = with_source(experiment, source, tmp_path / "run")
    run = train(given)
    expected, logged = weights(run), caplog.text
    assert ("has no eval split" in logged) == (form == "a list")
    assert ("read in its own order" in logged) == (form != "a list")
    if form == "a list":
        with pytest.raises(ConfigError, match=r"data\.source was <a list>, which has no import"):
            train(resume=killed(run))
        train(given, resume=run)
    else:
        train(resume=killed(run))
    assert weights(run) == expected


def test_a_data_set_that_cannot_be_read_leaves_no_run(experiment, tmp_path):
    with pytest.raises(DataError, match="has no feature 'caption'"):
        train(with_source(experiment, [{"image": b"", "text": "a"}] * 8, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
