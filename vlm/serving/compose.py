"""Export of a server with Prometheus: Dockerfile, compose file, wheel of vlm, and API keys."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm._html import render
from vlm.errors import CheckpointError, ConfigError
from vlm.serving.wheel import write_wheel

USER = 10001  # of the server, if root exports: it is no user of the host
# Templates, and the names of their files.
FILES = {
    "Dockerfile": "Dockerfile",
    "compose.yaml": "compose.yaml",
    "prometheus.yml": "prometheus.yml",
    "dockerignore": ".dockerignore",  # the keys are no part of the image
    "env": ".env",
}


@dataclass(frozen=True)
class Deployment:
    """A server in a container.

    Args:
        command: arguments of `vlm serve`.
        mounts: folders and files of the host, which the container has at the same paths.
        keys: API keys.
        address: address and port of the host, such as "127.0.0.1:8000".
        extras: extras of the package that the image needs besides `serve`.
    """

    command: Sequence[str]
    mounts: Sequence[Path]
    keys: Sequence[str]
    address: str
    extras: Sequence[str] = ()


def container_user() -> tuple[int, int]:
    """Return user and group of the server: those of this process, but never root's."""
    uid, gid = (os.getuid(), os.getgid()) if hasattr(os, "getuid") else (USER, USER)
    return (uid, gid) if uid else (USER, USER)


def write_compose(folder: Path, deployment: Deployment) -> list[Path]:
    """Write the files of a deployment into a new or empty folder, and return their paths.

    Raises:
        CheckpointError: the folder is not empty, or a mount does not exist or cannot be read.
        ConfigError: a key that a file of keys cannot hold.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise CheckpointError(f"{folder} is not empty: choose another folder for the export")
    uid, gid = container_user()
    for path in deployment.mounts:
        _check_readable(path, uid)
    for key in deployment.keys:
        if not key.isprintable() or set(key) & set("',"):
            raise ConfigError("an API key has a quote, a comma or a control character: change it")
    folder.mkdir(parents=True, exist_ok=True)
    wheel = write_wheel(folder)
    values = {
        "wheel": wheel.name,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "extras": ",".join(["serve", *deployment.extras]),
        "uid": uid,
        "gid": gid,
        "command": ", ".join(_quoted(word) for word in deployment.command),
        "mounts": [_quoted(str(path)) for path in deployment.mounts],
        "address": _quoted(f"{deployment.address}:8000"),
        "keys": ",".join(deployment.keys),
    }
    files = [wheel]
    for template, name in FILES.items():
        text = render(f"serving/docker/{template}", **values)
        files.append(folder / name)
        mode = 0o600 if template == "env" else 0o644
        descriptor = os.open(files[-1], os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(f"{text}\n")
    return files


def _check_readable(path: Path, uid: int) -> None:
    """Raise a CheckpointError if a mount is missing, or if its permissions exclude the server."""
    if not path.exists():
        raise CheckpointError(f"{path}, which the server needs, does not exist")
    if hasattr(os, "getuid") and os.getuid() == uid:
        readable = os.access(path, os.R_OK)
    else:
        needed = 0o5 if path.is_dir() else 0o4
        readable = path.stat().st_mode & needed == needed
    if not readable:
        raise CheckpointError(
            f"{path} cannot be read by the user {uid} of the server: run chmod -R o+rX on it"
        )


def _quoted(word: str) -> str:
    """Return a quoted YAML string, with `$` escaped for compose."""
    return json.dumps(word, ensure_ascii=False).replace("$", "$$")
