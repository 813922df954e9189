"""`vlm docs`: pages are built once, what cannot be done is refused; `tests/docs` builds them."""

import http.server
import socket
import sys

from vlm.cli import docs, main


def test_pages_are_built_once(tmp_path, capsys, monkeypatch):
    def build(folder, *, strict):
        folder.mkdir()
        built.append(folder)

    built, older = [], tmp_path / "docs" / f"{docs.vlm.__version__}-0123456789ab"
    older.mkdir(parents=True)
    monkeypatch.setenv("VLM_CACHE", str(tmp_path))
    monkeypatch.setattr(docs, "build", build)
    monkeypatch.setattr(http.server.ThreadingHTTPServer, "serve_forever", lambda self: None)
    assert main(["docs", "--port", "0"]) == main(["docs", "--port", "0"]) == 0
    assert capsys.readouterr().err.count("the documentation at http://localhost:") == 2
    assert list((tmp_path / "docs").iterdir()) == built
    assert len(built) == 1


def test_sources_of_a_clone_and_of_a_wheel(tmp_path, monkeypatch):
    docs.copy_sources(tmp_path / "clone")
    for name in ("conf.py", "howto/search.md", "tutorials/search.ipynb", "changelog.md"):
        assert (tmp_path / "clone" / name).is_file()
    monkeypatch.setattr(docs, "SOURCES", tmp_path / "clone")  # as a wheel has them
    monkeypatch.setattr(docs, "IN_A_CLONE", {"tutorials": tmp_path / "absent"})
    docs.copy_sources(tmp_path / "wheel")
    assert (tmp_path / "wheel" / "tutorials" / "search.ipynb").is_file()


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
