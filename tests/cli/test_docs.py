"""`vlm docs`: what cannot be done is refused. `tests/docs` builds the site."""

import socket
import sys

from vlm.cli import main


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


def test_without_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sphinx", None)
    assert main(["docs", "--out", str(tmp_path / "site")]) == 1
    assert 'pip install "vlm-jax[docs]"' in capsys.readouterr().err
    assert not (tmp_path / "site").exists()
