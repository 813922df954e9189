"""A run folder from elsewhere: `vlm eval` runs no code that its config names."""

import json

import pytest

from vlm.cli import main


@pytest.mark.parametrize("options", [[], ["--data.eval-split", "test"]])
def test_eval_runs_no_code_of_a_folder(tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "bundle").mkdir(parents=True)
    (tmp_path / "run" / "bundle" / "bundle.json").write_text("{}")
    source = "python:subprocess:check_output(args='touch owned', shell=True)"
    (tmp_path / "run" / "config.json").write_text(json.dumps({"data": {"source": source}}))
    assert main(["eval", "run", *options]) == 2
    assert "vlm eval runs no code that a folder names" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()
