"""Preparation of a data set as shards for fast training: resized, deduplicated, filtered.

All features that JSON supports keep their names, so the same config reads the shards. The `.txt` of
a tar is the first caption, for other readers. ArrayRecord files keep texts, numbers and lists.
CLIP_benchmark's layout keeps the class, or all captions: see `vlm.data.clip_benchmark`.

Each shard is written under a temporary name and renamed when complete, with a line in
`manifest.jsonl`: its number of examples, length, SHA-256, the skipped samples, and the read
position of the next shard. A run that was stopped continues after the last line.
"""

import collections
import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from vlm._json import to_json
from vlm.config import DataConfig
from vlm.data import array_record
from vlm.data.clip_benchmark import write_texts
from vlm.data.dataset_stats import duplicate_key
from vlm.data.example_reader import ExampleReader, Read
from vlm.data.examples import Example, captions_of, label_of, passes
from vlm.data.faults import BadSample
from vlm.data.members import TEXT
from vlm.data.shard_index import beside, write_index
from vlm.data.sources import classes_of, open_source
from vlm.data.transform_example import open_image_of
from vlm.errors import ConfigError, DataError
from vlm.inputs.opening import extension_of
from vlm.inputs.preprocess import Preprocess
from vlm.paths import as_path, is_remote

MANIFEST, NOTE = "manifest.jsonl", "preparation.json"
_HASHES = "hashes"  # of written images, to detect duplicates after a resume
_BATCH = 64  # examples in the thread pool


@dataclass(frozen=True)
class Preparation:
    """Settings of a preparation."""

    form: Literal["tar", "array_record", "clip_benchmark"] = "tar"
    examples: int = 10_000  # of a shard
    short_side: int | None = None  # pixels; larger images are resized; None keeps the files
    quality: int = 92  # of resized JPEG files
    deduplicate: bool = False  # skip images that equal an earlier one
    min_side: int = 0  # pixels; smaller images are skipped


class PreparedExample(NamedTuple):
    """An example to be written."""

    image: bytes
    suffix: str
    features: dict[str, Any]
    captions: list[str]
    text: str  # the caption for readers of one caption
    label: str | None
    duplicate_key: bytes
    dropped: tuple[str, ...] = ()  # features that the shard format does not support


Row = tuple[
    int, PreparedExample | BadSample, list[int]
]  # examples read, result, next read position
DUPLICATE = BadSample("duplicate", "", "it equals an earlier image")


def prepare(
    config: DataConfig,
    split: str,
    out: epath.PathLike,
    wanted: Preparation,
    preprocess: Preprocess,
    *,
    report: Callable[[int, int | None], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the examples of a split as shards into folder `out`, or resume a preparation.

    `report` is called with the number of examples read and the total. Returns totals: shards,
    examples, bytes, skipped samples by kind, and dropped features by name.

    Raises:
        DataError: the source cannot be opened, or `out` has other files.
        ConfigError: invalid sizes.
    """
    source = ExampleReader(config, split)
    folder, done = begin(config, split, out, wanted)
    place, read = (done[-1]["next"], done[-1]["read"]) if done else (None, 0)
    earlier = done if wanted.deduplicate else []
    seen = {key for line in earlier for key in _duplicate_keys(folder, line["shard"])}
    rows: list[Row] = []
    kept = 0

    def finish_shard() -> None:
        done.append(write(folder, split, rows, wanted, len(done)))
        append_to_manifest(folder, done[-1:])

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for result, next_place in _in_parallel(
            source.read(place), pool, config, wanted, preprocess
        ):
            read += 1
            if isinstance(result, PreparedExample):
                if wanted.deduplicate and result.duplicate_key in seen:
                    result = DUPLICATE
                else:
                    kept += 1
                    if wanted.deduplicate:
                        seen.add(result.duplicate_key)
            rows.append((read, result, next_place))
            if kept == wanted.examples:
                finish_shard()
                rows, kept = [], 0
            if read % 256 == 0:
                report(read, source.count)
    if rows:
        finish_shard()
    report(read, source.count)
    return finish(folder, split, wanted, done)


def begin(
    config: DataConfig, split: str, out: epath.PathLike, wanted: Preparation
) -> tuple[epath.Path, list[dict[str, Any]]]:
    """Open the folder; return it and the manifest lines of finished shards."""
    if wanted.examples < 1 or not 1 <= wanted.quality <= 100:
        raise ConfigError(
            f"a shard of {wanted.examples} examples of quality {wanted.quality} is invalid: give "
            "at least 1 example, and a quality of 1 to 100"
        )
    if wanted.form == "array_record":
        array_record.check_installed()
    folder = as_path(out)
    if is_remote(folder):
        raise DataError(f"{folder} is in a bucket: prepare into a local folder and copy it there")
    about = {"source": config.source, "split": split, **asdict(wanted)}
    about |= {"captions": config.captions, "label": config.label, "keep": config.filters}
    names, templates = None, ()
    if wanted.form == "clip_benchmark" and config.label:
        source = open_source(config, split)
        about["labels"], names = classes_of(config, source)
        templates = getattr(source, "templates", None) or ()
    done = _open_folder(folder, json.loads(json.dumps(about, default=asdict)))
    if wanted.form == "clip_benchmark":
        write_texts(folder, names, templates)
    return folder, done


def finish(
    folder: epath.Path, split: str, wanted: Preparation, done: list[dict[str, Any]]
) -> dict[str, Any]:
    """Complete the folder after its last shard; return the totals."""
    files = [os.fspath(folder / line["file"]) for line in done if line["file"]]
    if wanted.form == "clip_benchmark" and files:
        (folder / split / "nshards.txt").write_text(f"{len(files)}\n")
        write_index(files, beside(files))
    return totals(done)


def _in_parallel(
    reads: Iterator[Read],
    pool: ThreadPoolExecutor,
    config: DataConfig,
    wanted: Preparation,
    preprocess: Preprocess,
) -> Iterator[tuple[PreparedExample | BadSample, list[int]]]:
    while batch := list(itertools.islice(reads, _BATCH)):
        results = pool.map(lambda read: make(read.example, config, wanted, preprocess), batch)
        yield from zip(results, (read.after for read in batch), strict=True)


def make(
    example: Example | BadSample, config: DataConfig, wanted: Preparation, preprocess: Preprocess
) -> PreparedExample | BadSample:
    """Prepare an example for writing; a `BadSample` means that it is skipped."""
    if isinstance(example, BadSample):
        return example
    if not passes(example, config.filters):
        return BadSample("filtered", "", "rejected by data.filters")
    try:
        captions = captions_of(example, config)
        image = open_image_of(example, config, preprocess, "an example")
    except BadSample as fault:
        return fault
    if min(image.size) < wanted.min_side:
        return BadSample("too small", "", f"it has {image.width}x{image.height} pixels")
    stored = example[config.image]
    if isinstance(stored, str | os.PathLike):
        stored = as_path(stored).read_bytes()
    if wanted.short_side is not None and min(image.size) > wanted.short_side:
        scale = wanted.short_side / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        smaller, buffer = image.resize(size, Image.Resampling.LANCZOS), io.BytesIO()
        smaller.save(buffer, "JPEG", quality=wanted.quality)
        data, suffix = buffer.getvalue(), "jpg"
    else:
        data, suffix = stored, extension_of(stored)
    plain = {
        name: _plain(value)
        for name, value in example.items()
        if name != config.image and not name.startswith("\0")
    }
    features = {name: value for name, value in plain.items() if _fits(value, wanted)}
    dropped = tuple(name for name, value in plain.items() if name not in features)
    text = str(features[TEXT]) if TEXT in config.captions and features.get(TEXT) else captions[0]
    label = label_of(example, config) if config.label else None
    key = duplicate_key(image)
    return PreparedExample(data, suffix, features, captions, text, label, key, dropped)


def _plain(value: Any) -> Any:
    """Convert a NumPy value to Python."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _fits(value: Any, wanted: Preparation) -> bool:
    """Whether the format supports a value: tar any JSON; ArrayRecord texts, numbers, flat lists."""
    if value is None or isinstance(value, str | int | float):  # bool is an int
        return True
    if isinstance(value, list | tuple):
        flat = wanted.form == "tar" or not any(isinstance(v, list | tuple) for v in value)
        return flat and all(_fits(v, wanted) for v in value)
    return wanted.form == "tar" and isinstance(value, dict) and _fits([*value.values()], wanted)


def write(
    folder: epath.Path,
    split: str,
    rows: list[Row],
    wanted: Preparation,
    number: int,
    unfinished: str = ".part",
) -> dict[str, Any]:
    """Write shard `number`, if its rows have examples; return its manifest line."""
    kept = [result for _, result, _ in rows if isinstance(result, PreparedExample)]
    left_out: collections.Counter[str] = collections.Counter()
    for _, result, _ in rows:
        if isinstance(result, BadSample):
            left_out[result.kind] += result.samples
    name = {
        "tar": f"{split}-{number:05d}.tar",
        "array_record": f"{split}-{number:05d}.array_record",
        "clip_benchmark": f"{split}/{number}.tar",
    }[wanted.form]
    line: dict[str, Any] = {"shard": number, "file": name if kept else None}
    if kept:
        part = folder / f"{name}{unfinished}"
        part.parent.mkdir(exist_ok=True)
        if wanted.form == "array_record":
            _write_records(part, kept)
        else:
            members = _members if wanted.form == "tar" else _clip_benchmark_members(folder)
            _write_tar(part, kept, number, members)
        with open(part, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        line |= {"bytes": part.stat().length, "sha256": digest}
        os.replace(part, folder / name)
        keys = folder / _HASHES
        keys.mkdir(exist_ok=True)
        (keys / f"{number:05d}").write_bytes(b"".join(k.duplicate_key for k in kept))
        line |= {"dropped": collections.Counter(name for k in kept for name in k.dropped)}
    read, _, place = rows[-1]
    return line | {"examples": len(kept), "left_out": dict(left_out), "read": read, "next": place}


def append_to_manifest(folder: epath.Path, lines: list[dict[str, Any]]) -> None:
    """Append lines to the manifest, which marks their shards as written."""
    with open(folder / MANIFEST, "a", encoding="utf-8") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)
        f.flush()
        os.fsync(f.fileno())


def _members(item: PreparedExample) -> dict[str, bytes]:
    """Return the members of an example by suffix; the feature `txt` is the member `.txt`."""
    fields = {name: value for name, value in item.features.items() if name != TEXT}
    text = to_json(fields, ensure_ascii=False).encode()
    return {item.suffix: item.image, TEXT: item.text.encode(), "json": text}


def _clip_benchmark_members(folder: epath.Path) -> Callable[[PreparedExample], dict[str, bytes]]:
    """Return `_members` of CLIP_benchmark's layout: the number of the class, or all captions."""
    labels = json.loads((folder / NOTE).read_text()).get("labels", ())
    numbers = {label: i for i, label in enumerate(labels)}

    def members(item: PreparedExample) -> dict[str, bytes]:
        if item.label is not None:
            return {item.suffix: item.image, "cls": str(numbers[item.label]).encode()}
        lines = (" ".join(caption.split()) for caption in item.captions)
        return {item.suffix: item.image, TEXT: "\n".join(lines).encode()}

    return members


def _write_tar(
    path: epath.Path,
    kept: list[PreparedExample],
    number: int,
    members: Callable[[PreparedExample], dict[str, bytes]],
) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, item in enumerate(kept):
            for suffix, data in members(item).items():
                info = tarfile.TarInfo(f"{number:05d}{i:06d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def _write_records(path: epath.Path, kept: list[PreparedExample]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(os.fspath(path), "group_size:1")
    for item in kept:
        writer.write(
            array_record.serialize({"caption": item.captions, **item.features, "image": item.image})
        )
    writer.close()


def _open_folder(folder: epath.Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of finished shards, after a check that the settings are the same."""
    note = folder / NOTE
    if note.exists():
        if json.loads(note.read_text()) != about:
            raise DataError(
                f"{folder} was prepared with other settings (see {note}): name another folder, or "
                "use those settings"
            )
        return finished(folder)
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(about, indent=2) + "\n")
    return []


def finished(folder: epath.Path) -> list[dict[str, Any]]:
    """Read the lines of the manifest, one per complete shard."""
    path, lines = folder / MANIFEST, []
    if not path.exists():
        return []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # truncated when the run was killed: the shard is rewritten
            break
    complete = "".join(json.dumps(line) + "\n" for line in lines)
    if complete != path.read_text():
        path.write_text(complete)
    return lines


def _duplicate_keys(folder: epath.Path, number: int) -> list[bytes]:
    path = folder / _HASHES / f"{number:05d}"
    data = path.read_bytes() if path.exists() else b""
    return [data[i : i + 8] for i in range(0, len(data), 8)]


def totals(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum up all lines: shards, examples, bytes, skipped samples and dropped features."""
    left_out: collections.Counter[str] = collections.Counter()
    dropped: collections.Counter[str] = collections.Counter()
    for line in lines:
        left_out.update(line["left_out"])
        dropped.update(line.get("dropped", {}))
    return {
        "shards": sum(line["file"] is not None for line in lines),
        "examples": sum(line["examples"] for line in lines),
        "bytes": sum(line.get("bytes", 0) for line in lines),
        "left_out": dict(left_out),
        "dropped": dict(dropped),
    }
