"""Files of the splits of a data set on the Hub, or of a folder with shards.

The rules are those of Hugging Face `datasets`: the `configs` in the YAML of README.md list the
files by split. Without them the names of folders or files have the splits, as in
`data/train-00000-of-00002.parquet`; other files are the training split. If vlm cannot read the
files of a data set on the Hub, its Parquet copy at `refs/convert/parquet` is used.
"""

import functools
import logging
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import fsspec.utils

from vlm.data.hub_access import (
    SCHEME,
    Repository,
    check_access,
    data_set_of,
    list_repository,
    refuse_files,
)
from vlm.data.storage import expand, read_file
from vlm.errors import DataError, first_line
from vlm.inputs.folders import files_under, is_image_name
from vlm.paths import is_remote

KINDS = {".parquet": "parquet", ".tar": "tar", ".tfrecord": "tfrecord"}  # of shards
PLACE = "{split}"

_TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_COPY = "refs/convert/parquet"
_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARDED = re.compile(r"(?:^|/)data/([^/]+)-\d{5}-of-\d{5}[^/]*$")
_README = "README.md"
_SHOWN = 12  # configs in a message
_log = logging.getLogger(__name__)


class Layout(NamedTuple):
    """The kind of a data set's files, and the files of each split.

    The only split is "" if neither names nor README.md have splits.
    """

    kind: str
    splits: dict[str, list[str]]


def has_split_names(source: str) -> bool:
    """Whether splits are known by the names of files: `{split}` in a pattern, or a layout."""
    layout = find_layout(source)
    return PLACE in source if layout is None else "" not in layout.splits


def files_of(source: str) -> list[str]:
    """List the files of a source without splits in their names."""
    layout = find_layout(source)
    return expand(source) if layout is None else layout.splits[""]


def find_layout(source: str) -> Layout | None:
    """Return the layout of a data set on the Hub, or of a folder with shards; None for others.

    Raises:
        DataError: the Hub or data set cannot be read, or has several configs or kinds of files.
    """
    if source.startswith(SCHEME):
        return _on_hub(source) if data_set_of(source) else None
    if is_remote(source) or re.search(r"[*{:]", source) or not _may_hold_shards(source):
        return None
    times = [path.stat().st_mtime_ns for path in _tops(source)]
    return _in_folder(source.rstrip("/"), tuple(times))


@functools.lru_cache(64)  # errors are not cached
def _on_hub(source: str) -> Layout:
    named = data_set_of(source)
    assert named is not None
    check_access(named.root)
    repository = list_repository(named)
    assert repository is not None
    splits = _splits(repository.files, named.inner, source, f"{repository.root}/")
    layout = _layout(splits, source) if splits else None
    if layout is None and named.revision is None:
        layout = _converted(repository, named.inner, source)
    if layout is None:
        refuse_files(source, repository)
    whole = {
        split: [name if "://" in name else f"{repository.root}/{name}" for name in files]
        for split, files in layout.splits.items()
    }
    counts = ", ".join(f"{split or 'all'}: {len(files):,}" for split, files in whole.items())
    _log.info("%s is read at commit %s; files by split: %s", source, repository.commit, counts)
    return Layout(layout.kind, whole)


def _converted(repository: Repository, config: str, source: str) -> Layout | None:
    """Return the layout of the Hub's Parquet copy of a data set; None if it has none."""
    copy = list_repository(repository.named._replace(revision=_COPY), missing=True)
    if copy is None:
        return None
    configs = sorted({name.split("/")[0] for name in copy.files if name.endswith(".parquet")})
    if not configs:
        return None
    config = config or _only(configs, source)
    splits: dict[str, list[str]] = {}
    for name in copy.files:
        parts = name.split("/")
        if len(parts) == 3 and parts[0] == config and name.endswith(".parquet"):
            splits.setdefault(parts[1], []).append(f"{copy.root}/{name}")
    if not splits:
        raise DataError(f"{source} has no config {config!r}: it has {', '.join(configs)}")
    partial = [split for split in splits if split.startswith("partial-")]
    if partial:
        raise DataError(
            f"vlm cannot read the files of {source}, and the Hub's Parquet copy has only a part of "
            f"it: name that part, {splits[partial[0]][0].rpartition('/')[0]}/*.parquet, or run "
            f"`hf download --repo-type dataset {repository.named.name} --local-dir FOLDER`"
        )
    _log.warning("%s has no files that vlm reads: its copy at @%s is used", source, _COPY)
    return Layout("parquet", splits)


@functools.lru_cache(64)
def _in_folder(root: str, times: tuple[int, ...]) -> Layout | None:
    """Return the layout of a local folder of shards; None for one with images."""
    root = os.path.expanduser(root)
    names = [os.path.relpath(path, root).replace(os.sep, "/") for path in files_under(root)]
    if any(map(is_image_name, names)):
        return None
    splits = _splits(names, "", root, f"{root}/")
    layout = _layout(splits, root) if splits else None
    if layout is None or layout.kind == "table":
        return None
    whole = {split: [f"{root}/{name}" for name in files] for split, files in layout.splits.items()}
    return Layout(layout.kind, whole)


def _may_hold_shards(source: str) -> bool:
    """Whether a local folder has shards, by the files at its top and in `data`."""
    for folder in _tops(source):
        found = [path.name for path in folder.iterdir()]
        if any(map(_kind, _without_sidecars(found))) or _README in found:
            return True
    return False


def _tops(source: str) -> list[pathlib.Path]:
    folder = pathlib.Path(source).expanduser()
    return [inner for inner in (folder, folder / "data") if inner.is_dir()]


def _splits(
    names: Sequence[str], inner: str, source: str, root: str
) -> dict[str, list[str]] | None:
    """Return the files of each split, relative to the root; None if there are none."""
    configs = _configs(root, source) if _README in names else {}
    if inner in configs or (configs and not inner):
        config = configs[inner or _only(list(configs), source, configs)]
        folder = str(config.get("data_dir") or "").strip("/")
        if config.get("data_files"):
            return _by_patterns(config["data_files"], folder, names, source)
        inner = folder
    under = [name for name in names if not inner or name == inner or name.startswith(f"{inner}/")]
    if configs and not under:
        known = ", ".join(configs)
        raise DataError(f"{source} has no files in {inner!r}, and the configs {known}: name one")
    return _by_convention(_readable(under))


def _configs(root: str, source: str) -> dict[str, dict[str, Any]]:
    """Read the configs in the YAML of README.md, by their names."""
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    try:
        block = REGEX_YAML_BLOCK.search(read_file(root + _README).decode(errors="replace"))
        values = yaml.safe_load(block[2]) if block else {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise DataError(
            f"the README.md of {source} has YAML that cannot be read ({why}): name the files in "
            "data.source"
        ) from None
    except OSError as error:
        why = first_line(error)
        raise DataError(f"the README.md of {source} cannot be read ({why}): try again") from None
    given = values.get("configs") if isinstance(values, dict) else None
    configs = [c for c in given if isinstance(c, dict)] if isinstance(given, list) else []
    return {str(config["config_name"]): config for config in configs if "config_name" in config}


def _only(names: list[str], source: str, configs: dict[str, dict[str, Any]] | None = None) -> str:
    """Return the default config, or the only one."""
    default = [name for name in names if (configs or {}).get(name, {}).get("default")]
    if len(names) == 1 or "default" in names or default:
        return names[0] if len(names) == 1 else (default or ["default"])[0]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise DataError(
        f"{source} has the configs {', '.join(names[:_SHOWN])}{more}: name one of them, as in "
        f"{source.rstrip('/')}/{names[0]}"
    )


def _by_patterns(
    given: Any, folder: str, names: Sequence[str], source: str
) -> dict[str, list[str]] | None:
    """Match the `data_files` of a config with the files of a repository."""
    entries = given if isinstance(given, list) else [given]
    splits: dict[str, list[str]] = {}
    for entry in entries:
        split, path = "train", entry
        if isinstance(entry, dict) and "split" in entry:
            split, path = str(entry["split"]), entry.get("path")
        for pattern in path if isinstance(path, list) else [path]:
            if not isinstance(pattern, str):
                raise DataError(
                    f"the README.md of {source} has the data_files {pattern!r}: name the files in "
                    "data.source"
                )
            splits.setdefault(split, []).extend(_matches(pattern, folder, names))
    if missing := [split for split, files in splits.items() if not files]:
        raise DataError(
            f"the README.md of {source} names files of the split {missing[0]!r} that are not "
            "there: name the files in data.source"
        )
    found = {split: _readable(list(dict.fromkeys(files))) for split, files in splits.items()}
    return found if found and all(found.values()) else None


def _matches(pattern: str, folder: str, names: Sequence[str]) -> Iterable[str]:
    if "://" in pattern:
        return [pattern]
    whole = "/".join(filter(None, [folder, pattern.removeprefix("./")]))
    regex = re.compile(fsspec.utils.glob_translate(whole))
    return sorted(name for name in names if regex.match(name))


def _readable(names: Sequence[str]) -> list[str]:
    """Return the shards among files, else the tables of images, else nothing."""
    shards = [name for name in _without_sidecars(names) if _kind(name)]
    if shards:
        return sorted(shards)
    return sorted(name for name in names if name.rpartition("/")[2] in _TABLES)


def _without_sidecars(names: Sequence[str]) -> Iterator[str]:
    """Leave out the Parquet files that img2dataset writes beside shards and folders."""
    stems = {name.removesuffix(ending) for name in names for ending in (".tar", ".tfrecord")}
    stems |= {name.rpartition("/")[0] for name in names}
    for name in names:
        if not (name.endswith(".parquet") and name.removesuffix(".parquet") in stems):
            yield name


def _kind(name: str) -> str | None:
    last = name.rpartition("/")[2]
    if last in _TABLES:
        return None
    return next((kind for ending, kind in KINDS.items() if last.endswith(ending)), None)


def _by_convention(names: list[str]) -> dict[str, list[str]] | None:
    """Sort files into splits by their names."""
    if not names:
        return None
    splits: dict[str, list[str]] = {}
    for name in names:
        if match := _SHARDED.search(name):
            splits.setdefault(match[1], []).append(name)
    if splits:
        return splits
    for part in (0, 2):  # of the folders, or of the file
        for split, words in _KEYWORDS.items():
            regex = re.compile(rf"(?:^|[-._ 0-9/])(?:{'|'.join(words)})(?=[-._ 0-9/]|$)")
            found = [name for name in names if regex.search(name.rpartition("/")[part])]
            if found:
                splits[split] = found
        if splits:
            return splits
    return {"": names}


def _layout(splits: dict[str, list[str]], source: str) -> Layout | None:
    """Return the splits with their kind; DataError for several kinds of files."""
    found: dict[str, str] = {}
    for name in (name for files in splits.values() for name in files):
        found.setdefault(_kind(name) or "table", name)
    if len(found) > 1:
        raise DataError(
            f"{source} has files of several kinds, such as {' and '.join(found.values())}: name "
            "those of one kind in data.source"
        )
    for split, files in splits.items():
        if "table" in found and len(files) > 1:
            raise DataError(
                f"{source} has {len(files)} tables of the split {split or 'train'!r} ({files[0]}, "
                f"{files[1]}): name one of them in data.source"
            )
    return Layout(next(iter(found)), splits) if found else None
