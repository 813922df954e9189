import os

import pytest

from vlm.errors import ConfigError
from vlm.paths import as_path, cache_dir, is_remote


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "own"))
    assert os.fspath(cache_dir()) == str(tmp_path / "own")
    monkeypatch.delenv("VLM_CACHE")
    assert os.fspath(cache_dir()) == str(tmp_path / "xdg" / "vlm")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification: as if unset
    assert os.fspath(cache_dir()) == str(tmp_path / "home" / ".cache" / "vlm")
    assert cache_dir().is_dir()


def test_cache_dir_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match=r"file/cache.*set VLM_CACHE"):
        cache_dir()


def test_remote_paths_stay_remote():
    assert is_remote("gs://bucket/x")
    assert not is_remote("/data/x")
    assert os.fspath(as_path("~/x")) == os.path.expanduser("~/x")


def test_addresses_that_are_not_read():
    with pytest.raises(ConfigError, match=r"https://x/y is an address of the web.*download it"):
        as_path("https://x/y")
    with pytest.raises(ConfigError, match=r"file:///x begins with file://: give a local path"):
        as_path("file:///x")
