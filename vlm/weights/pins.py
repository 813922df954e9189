"""The commit of each Hub model that this machine uses, recorded in vlm's cache folder.

The first download of a model records its commit and the sizes of its files. Later loads use exactly
these files, without a network, until `hub.update` fetches a newer commit.
"""

import json
import os
from dataclasses import asdict, dataclass

from etils import epath

from vlm.paths import cache_dir


@dataclass(frozen=True)
class Pin:
    """A commit, and the size in bytes of each file that was fetched of it."""

    commit: str
    files: dict[str, int]


def read_pin(name: str) -> Pin | None:
    """Return the recorded commit of a Hub model; None if there is none, or it is unreadable."""
    try:
        values = json.loads(_file(name).read_text())
        return Pin(str(values["commit"]), {str(k): int(v) for k, v in values["files"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_pin(name: str, pin: Pin) -> None:
    """Record the commit of a Hub model; the file is replaced atomically."""
    file = _file(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.parent / f"{file.name}.{os.getpid()}"
    partial.write_text(json.dumps(asdict(pin), indent=2) + "\n")
    partial.replace(file)


def forget_pin(name: str) -> None:
    """Forget the recorded commit of a Hub model, so that the next load fetches the newest."""
    _file(name).unlink(missing_ok=True)


def pinned_folder(name: str, pin: Pin) -> epath.Path | None:
    """Return the folder of the recorded commit in the Hub's cache; None if a file is not whole."""
    from huggingface_hub import constants

    snapshots = epath.Path(constants.HF_HUB_CACHE) / hub_folder(name) / "snapshots"
    folder = snapshots / pin.commit
    for file, size in pin.files.items():
        try:
            if os.path.getsize(folder / file) != size:
                return None
        except OSError:
            return None
    return folder if pin.files else None


def hub_folder(name: str) -> str:
    """Return the name of a model's folder in the Hub's cache."""
    return "models--" + name.replace("/", "--")


def _file(name: str) -> epath.Path:
    return cache_dir() / "hub" / f"{hub_folder(name)}.json"
