"""`vlm data tokenizer`: the vocabulary of a model, or a new one, as `--tokenizer-file` reads it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny
from tiny import siglip_folder

import vlm
from vlm.cli import main
from vlm.config import TokenizerConfig
from vlm.inputs.tokenizer import Tokenizer
from vlm.models import recipes

GOLDEN = Path(__file__).parents[1] / "weights" / "golden" / "hf_siglip"


def run(*arguments) -> int:
    return main(["data", "tokenizer", *map(str, arguments)])


def test_the_vocabulary_of_a_model_gives_its_token_ids(tmp_path, capsys):
    out, model = tmp_path / "c4_en", siglip_folder(tmp_path / "siglip")
    assert run(out, "--model", model) == 0
    file = out / "tokenizer.json"
    assert capsys.readouterr().out.startswith(f"{file}: ")
    theirs = vlm.load(model).tokenizer
    rules = recipes.siglip("B/16", tokenizer_file=str(file))["tokenizer"]  # those of the configs
    length = theirs.config.context_length
    ours = Tokenizer.from_file(file, dataclasses.replace(rules, context_length=length))
    texts = ["a red square", "Two cats, one dog.", "", "a  photo of\nthe sea"]
    assert np.array_equal(ours(texts), theirs(texts))


def test_a_new_vocabulary_of_a_table_and_of_shards(tmp_path, capsys):
    data = tiny.folder() / "data"
    assert run(tmp_path / "bpe", "--source", data, "--vocab-size", 300, "--clean", "siglip") == 0
    assert "tokens" in capsys.readouterr().out
    rules = TokenizerConfig(context_length=16, pad_id=1, eos_id=1, clean="siglip")
    tokenizer = Tokenizer.from_file(tmp_path / "bpe" / "tokenizer.json", rules)
    assert tokenizer.vocab_size <= 300
    assert len(tokenizer.lengths("A Red Square.")) == 1
    assert tokenizer.lengths("A Red Square.") == tokenizer.lengths("a red square")

    assert main(["data", "prepare", str(data), str(tmp_path / "shards"), "--examples", "5"]) == 0
    line = ("--source", tmp_path / "shards" / "*.tar", "--captions", "txt", "--vocab-size", 300)
    assert run(tmp_path / "of-shards", *line, "--limit", 7) == 0
    assert (tmp_path / "of-shards" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "needs one of --model and --source"),
        (["--model", GOLDEN, "--source", "x"], 2, "needs one of --model and --source"),
        (["--source", "no-such-folder/"], 1, "no-such-folder"),
        (["--source", tiny.folder() / "data", "--vocab-size", 100], 1, "make it at least 258"),
        (["--source", tiny.folder() / "data", "--limit", 0], 2, "reads nothing"),
        (["--source", tiny.folder() / "data", "--captions", "text"], 1, "no feature 'text'"),
        (["--model", "no/such/folder"], 1, "there is no model 'no/such/folder'"),
    ],
)
def test_what_it_refuses(tmp_path, capsys, arguments, code, message):
    assert run(tmp_path / "out", *arguments) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_it_writes_over_nothing(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    assert run(tmp_path / "mine", "--model", GOLDEN) == 2
    assert "exists already" in capsys.readouterr().err
