"""Export of a Dockerfile and a compose file for the server and Prometheus."""

import json
from pathlib import Path

from vlm._html import render
from vlm._version import __version__
from vlm.errors import CheckpointError


def write_compose(folder: Path, command: tuple[str, ...], mounts: dict[Path, bool]) -> list[Path]:
    """Write the Docker files into a new or empty folder, and return their paths.

    Args:
        command: arguments of `vlm serve`.
        mounts: host folders that the container mounts at the same path, and whether each exists.

    Raises:
        CheckpointError: the folder is not empty, or a folder to mount does not exist.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise CheckpointError(f"{folder} is not empty: choose another folder for the export")
    for path, exists in mounts.items():
        if not exists:
            raise CheckpointError(f"{path}, which the server needs, does not exist")
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "version": __version__,
        "command": ", ".join(_quoted(word) for word in command),
        "volumes": [_quoted(f"{path}:{path}:ro") for path in mounts],
    }
    files = [folder / name for name in ("Dockerfile", "compose.yaml", "prometheus.yml")]
    for file in files:
        text = render(f"serving/docker/{file.name}", **values)
        file.write_text(f"{text}\n", encoding="utf-8")
    return files


def _quoted(word: str) -> str:
    """Return a quoted YAML string, with `$` escaped for compose."""
    return json.dumps(word, ensure_ascii=False).replace("$", "$$")
