"""`vlm docs`: the pages hold every public name, and what cannot be is refused."""

import importlib
import inspect
import socket
import subprocess
import sys

import pytest
from test_import import IN_SUBPACKAGES, PUBLIC

from vlm.cli import main


@pytest.mark.slow
def test_pages_hold_every_public_name(tmp_path):
    # A process of its own: pdoc is given the subpackages with all of their names loaded.
    out = tmp_path / "site"
    line = [sys.executable, "-m", "vlm", "docs", "--out", str(out)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for room, name in PUBLIC + IN_SUBPACKAGES:
        if inspect.ismodule(getattr(importlib.import_module(room), name)):
            continue
        page = (out / f"{room.replace('.', '/')}.html").read_text()
        assert f">{name}<" in page or f"{room}.{name}" in page, f"{room} does not show {name}"
    losses = (out / "vlm" / "losses.html").read_text()
    assert 'id="contrastive_loss"' in losses
    assert "jaxlib" not in losses  # types without the modules they come from
    assert not (out / "vlm" / "losses").exists()  # subpackages, not the modules inside


def test_a_folder_that_is_there(tmp_path, capsys):
    (tmp_path / "diary.txt").write_text("mine")
    assert main(["docs", "--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_port_in_use(capsys):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        assert main(["docs", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot be served" in capsys.readouterr().err
    assert main(["docs", "--port", "70000"]) == 2
    assert "cannot be served" in capsys.readouterr().err


def test_without_pdoc(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pdoc", None)
    assert main(["docs", "--out", str(tmp_path / "site")]) == 1
    assert 'pip install "vlm-jax[docs]"' in capsys.readouterr().err
