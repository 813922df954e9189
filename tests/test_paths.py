import os

import pytest

import vlm
from vlm import paths
from vlm.errors import CheckpointError, ConfigError
from vlm.paths import as_path, cache_dir, is_remote


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "own"))
    assert os.fspath(cache_dir()) == str(tmp_path / "own")
    monkeypatch.delenv("VLM_CACHE")
    assert os.fspath(cache_dir()) == str(tmp_path / "xdg" / "vlm")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # XDG: as if unset
    assert os.fspath(cache_dir()) == str(tmp_path / "home" / ".cache" / "vlm")
    assert cache_dir().is_dir()


def test_cache_dir_that_cannot_be_created(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match=r"file/cache.*set VLM_CACHE"):
        cache_dir()


def test_remote_paths_stay_remote():
    assert is_remote("gs://bucket/x")
    assert not is_remote("/data/x")
    assert os.fspath(as_path("~/x")) == os.path.expanduser("~/x")


def test_unsupported_schemes_are_refused():
    with pytest.raises(ConfigError, match=r"https://x/y is a web address.*download it"):
        as_path("https://x/y")
    with pytest.raises(ConfigError, match=r"file:///x begins with file://: give a local path"):
        as_path("file:///x")


def test_a_bucket_whose_driver_is_not_installed(monkeypatch):
    monkeypatch.setitem(paths.DRIVERS, "s3", ("no_such_driver", "vlm-jax[s3]"))
    message = r"s3:// paths need no_such_driver: run pip install 'vlm-jax\[s3\]'"
    with pytest.raises(ConfigError, match=message):
        as_path("s3://bucket/x")
    with pytest.raises(CheckpointError, match=message):
        vlm.load("s3://bucket/x")


def test_errors_of_buckets_are_explained():
    class HttpError(Exception):
        __module__ = "gcsfs.retry"

    reasons = {
        OSError(28, "No space left on device"): "No space left on device",
        HttpError("Anonymous caller does not have storage.objects.create, 401"): "no credentials",
        OSError("Forbidden: https://storage.googleapis.com/b/x"): "grant it Storage Object Admin",
        FileNotFoundError("Bucket does not exist: x"): "there is no such bucket",
        ValueError("PERMISSION_DENIED: HTTP response code: 403"): "Storage Object Admin",
        OSError("Unable to locate credentials"): "AWS_ACCESS_KEY_ID",
        HttpError("backend error, 503"): "503",
    }
    for error, part in reasons.items():
        assert part in paths.storage_error_reason(error)
    assert paths.storage_error_reason(ValueError("shapes differ")) is None
    assert paths.storage_error_reason(ImportError("No module named 'matplotlib'")) is None
    with (
        pytest.raises(ConfigError, match=r"x cannot be read \(there is no such bucket\): look"),
        paths.as_config_error("x cannot be read", "look again"),
    ):
        raise FileNotFoundError("Bucket does not exist: x")
