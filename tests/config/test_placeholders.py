"""`gs://BUCKET` in shipped configs: replaced by `--bucket`, or refused with all options to set."""

import dataclasses
import re
import subprocess
import sys

import pytest

from vlm.cli import main
from vlm.cli.parse import UsageError
from vlm.cli.train import experiment_of
from vlm.config import (
    DataConfig,
    EvalConfig,
    Experiment,
    MixturePart,
    load_config,
    require_bucket,
    with_bucket,
    without_evals,
)
from vlm.config.files import shipped_configs
from vlm.config.placeholders import PLACEHOLDER
from vlm.data.sources import open_source
from vlm.errors import ConfigError
from vlm.training import train

WITH_BUCKET = [
    name for name, file in shipped_configs().items() if PLACEHOLDER in file.read_text("utf-8")
]


@pytest.mark.parametrize("name", WITH_BUCKET)
def test_a_bucket_completes_every_config(name):
    experiment = with_bucket(load_config(name), "gs://mine/")
    require_bucket(experiment)
    assert "BUCKET" not in repr(experiment)
    assert experiment.data.source.startswith("gs://mine/")
    assert dataclasses.replace(experiment, data=DataConfig()) != load_config(name)


@pytest.mark.parametrize("name", WITH_BUCKET)
def test_every_option_of_the_sentence_is_an_option_of_the_command(name):
    """What the sentence asks for is enough, and the command accepts it."""
    with pytest.raises(ConfigError, match="stands for a bucket of yours") as refused:
        experiment_of([name])
    options = re.findall(r"(--[\w.-]+)(?=,| and|;|$)", str(refused.value))
    options = [option for option in options if option != "--skip-evals"]
    assert "--data.source" in options
    experiment_of([name, *(word for option in options for word in (option, "/data/mine"))])
    for left in options:
        given = [word for o in options if o != left for word in (o, "/data/mine")]
        with pytest.raises(ConfigError, match=f"or set {re.escape(left)}"):
            experiment_of([name, *given])


def test_the_message_is_one_sentence():
    with pytest.raises(ConfigError) as refused:
        experiment_of(["siglip_b16"])
    assert str(refused.value) == (
        "BUCKET in the config stands for a bucket of yours: give --bucket gs://NAME, or set "
        "--tokenizer-file, --data.source, --evals.0.source and --evals.1.source; "
        "--skip-evals imagenet,coco leaves evaluations out"
    )


def test_options_of_the_command_line():
    mine = experiment_of(["siglip_b16", "--bucket", "gs://mine", "--skip-evals", "imagenet"])
    assert mine.tokenizer_file == "gs://mine/tokenizers/c4_en/tokenizer.json"
    assert [(e.name, e.source) for e in mine.evals] == [("coco", "wds:gs://mine/evals/coco")]
    folder = experiment_of(["siglip_b16", "--bucket=/data", "--data.source", "other/*.tar"])
    assert folder.data.source == "other/*.tar"
    assert folder.evals[0].source == "wds:/data/evals/imagenet1k"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--skip-evals", "imagenets"], "has no evaluation 'imagenets'.*it has imagenet, coco"),
        (["--bucket"], "--bucket needs a value"),
        (["--bucket", "gs://BUCKET"], "stands for a bucket of yours"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(Exception, match=message):
        experiment_of(["siglip_b16", *options])
    with pytest.raises(ConfigError, match="it has none"):
        without_evals(Experiment(), ["coco"])


@pytest.mark.slow
def test_plan_needs_no_bucket(capsys):
    assert main(["plan", "siglip_b16", "--topology", "h100:8", "--json"]) == 0
    assert '"batch_size": 32768' in capsys.readouterr().out


def test_a_placeholder_is_found_wherever_it_is():
    parts = MixturePart("a.tar"), MixturePart("gs://BUCKET/b.tar", class_names="gs://BUCKET/c.txt")
    experiment = Experiment(
        data=DataConfig(mixture=parts),
        evals=(EvalConfig(source="x/"), EvalConfig("y", source="tfds:y", data_dir="gs://BUCKET")),
    )
    with pytest.raises(ConfigError) as refused:
        require_bucket(experiment)
    for option in ("--data.mixture.1.source", "--data.mixture.1.class-names", "--evals.1.data-dir"):
        assert option in str(refused.value)
    assert "--evals.0" not in str(refused.value)
    assert "--skip-evals y leaves" in str(refused.value)
    require_bucket(Experiment(data=DataConfig("/data/BUCKET/pairs.csv"), name="BUCKET"))  # no place


def test_library_and_other_readers_refuse_it_too():
    experiment = load_config("siglip_b16")
    with pytest.raises(ConfigError, match="give --bucket"):
        train(experiment)
    with pytest.raises(ConfigError, match=r"BUCKET in data.source .gs://BUCKET/pairs"):
        open_source(experiment.data, "train")


@pytest.mark.slow
def test_the_command_refuses_before_it_meets_other_hosts(tmp_path):
    line = [sys.executable, "-m", "vlm", "train", "siglip_b16", "--coordinator", "10.0.0.1:1"]
    line += ["--processes", "2", "--process-id", "1", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "give --bucket gs://NAME" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_bucket_without_a_placeholder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--bucket needs a config that names gs://BUCKET"):
        experiment_of(["--init-from", "model", "--data.source", "a", "--bucket", "gs://mine"])
