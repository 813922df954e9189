"""`vlm serve --export compose`: the options of the command as files of a deployment."""

import inspect
import ipaddress
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.cli.parse import UsageError
from vlm.cli.terminal import print_status
from vlm.errors import CheckpointError
from vlm.paths import as_path, is_remote

# Options that reach the server in another way than as arguments of its command with their values.
OWN_WAY = {
    "index": "first argument, with a mount",
    "model": "with a mount",
    "root": "with mounts",
    "templates": "with mounts",
    "host": "address at which the container's port is published",
    "port": "port at which the container's port is published",
    "api_key": "file .env",
    "export": "names the folder that is written",
}
MOST_MOUNTS = 32  # of folders of images
BUCKETS = {"gs://": "gcs", "s3://": "s3"}  # extras that they need


def export_compose(
    command: Callable[..., None],
    given: Mapping[str, Any],
    index: Path | None,
    model: str,
    keys: Sequence[str],
    moved: Mapping[str, str],
) -> None:
    """Write the files of a deployment, and print their paths.

    Args:
        command: the function of `vlm serve`, whose parameters are its options.
        given: all options by name.
        index: folder of the index, if there is one.
        model: path or name of the model.
        keys: API keys; without any, one is made.
        moved: old and new folders of images.

    Raises:
        UsageError: an option that a container cannot have.
        CheckpointError: an index whose images cannot be mounted; see `write_compose`.
    """
    export = given["export"]
    if len(export) != 2 or export[0] != "compose":
        raise UsageError("--export needs compose and a folder, such as --export compose deploy/")
    from vlm.serving.compose import Deployment, write_compose

    mounts: dict[Path, None] = {}

    def mounted(place: str) -> str:
        """Make a local path absolute and mount it; return any other text unchanged."""
        if is_remote(place) or not as_path(place).exists():
            return place
        path = os.path.abspath(as_path(place))
        mounts[Path(path)] = None
        return path

    words = [] if index is None else [mounted(os.fspath(index))]
    words.append(f"--model={mounted(model)}")
    if given["templates"]:
        words += ["--templates", *map(_mounted_template(mounted), given["templates"])]
    if moved:
        words += ["--root", *(f"{old}={mounted(new)}" for old, new in moved.items())]
    words += command_options(command, given)
    images, extras = ([], set()) if index is None else _images(index, moved)
    mounts |= dict.fromkeys(images)
    extras |= {extra for scheme, extra in BUCKETS.items() if model.startswith(scheme)}
    deployment = Deployment(
        command=words,
        mounts=list(mounts),
        keys=keys or [secrets.token_urlsafe(24)],
        address=_address(given["host"], given["port"]),
        extras=sorted(extras),
    )
    for file in write_compose(Path(export[1]).expanduser(), deployment):
        print(file)
    made = "the API keys are" if keys else "a new API key is"
    print_status(f"{made} in {Path(export[1]) / '.env'}, which only its owner can read")
    print_status(
        f"start the server with: docker compose --project-directory {export[1]} up --build"
    )


def command_options(command: Callable[..., None], given: Mapping[str, Any]) -> list[str]:
    """Return the options with values other than their defaults, as arguments of a command.

    Options of `OWN_WAY` are left out.
    """
    words = []
    for name, parameter in inspect.signature(command).parameters.items():
        option, value = name.replace("_", "-"), given[name]
        if name in OWN_WAY or value == parameter.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, tuple):
            words += [f"--{option}", *map(str, value)]
        else:
            words.append(f"--{option}={value}")
    return words


def _mounted_template(mounted: Any) -> Any:
    from vlm.heads.templates import is_place

    # FILE.json:KEY names an entry of a file.
    def template(text: str) -> str:
        if not is_place(text):
            return text
        file, ending, key = text.partition(".json")
        return mounted(file + ending) + key

    return template


def _address(host: str, port: int) -> str:
    """Return address and port of the host, in the form of a compose file."""
    if port == 0:
        raise UsageError("--port 0 chooses a port at each start: give another one to export")
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise UsageError(f"--host {host!r} is no address: give one such as 0.0.0.0") from None
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def _images(index: Path, moved: Mapping[str, str]) -> tuple[list[Path], set[str]]:
    """Return folders with all images of an index, and the extras that read their formats.

    Raises:
        CheckpointError: a relative path.
    """
    from vlm.heads import index_folder
    from vlm.heads.image_paths import is_image_path, is_relative, relocated
    from vlm.inputs.opening import ADDED_FORMATS

    meta = index_folder.read_description(index)
    ids = [id for shard in index_folder.read_shards(index, meta) for id in shard["ids"]]
    paths = [id for id in relocated(ids, moved)[0] if is_image_path(id)]
    if relative := next(filter(is_relative, paths), None):
        raise CheckpointError(
            f"the index {index} has relative paths, such as {relative!r}: give their folder with "
            "--root .=FOLDER"
        )
    suffixes = {os.path.splitext(path)[1].lower() for path in paths}
    extras = {extra for ends, _, extra, _ in ADDED_FORMATS.values() if suffixes & set(ends)}
    extras |= {
        extra for scheme, extra in BUCKETS.items() if any(p.startswith(scheme) for p in paths)
    }
    paths = [path for path in paths if not is_remote(path)]
    folders = {os.path.dirname(path) for path in paths}
    folders |= {os.path.dirname(os.path.realpath(path)) for path in paths if os.path.islink(path)}
    missing = sorted(folder for folder in folders if not os.path.isdir(folder))
    if missing:
        print_status(
            f"{len(missing):,} folders of images do not exist, such as {missing[0]}: they have no "
            "pictures on the page (--root OLD=NEW names where they are)"
        )
    return _few(folders - set(missing)), extras


def _few(folders: set[str]) -> list[Path]:
    """Return at most `MOST_MOUNTS` folders above all of these, as deep as possible."""
    kept = {Path(folder) for folder in folders}
    while True:
        kept = {path for path in kept if not kept & set(path.parents)}
        if len(kept) <= MOST_MOUNTS:
            return sorted(kept)
        depth = max(len(path.parts) for path in kept)
        kept = {path.parent if len(path.parts) == depth else path for path in kept}
