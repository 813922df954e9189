"""Preparation of a data set as shards for fast training: resized, deduplicated, filtered.

All features that JSON supports keep their names, so the same config reads the shards. The `.txt` of
a tar is the first caption, for other readers. ArrayRecord files keep texts, numbers and lists.
CLIP_benchmark's layout keeps the class, or all captions: see `vlm.data.clip_benchmark`.

Each shard is written under a temporary name and renamed when complete, with a line in
`manifest.jsonl`: its number of examples, length, SHA-256, the skipped samples, and the read
position of the next shard. A run that was stopped continues after the last line. `totals.json` has
the sums of a finished run, with the number of skipped samples of each filter.
"""

import collections
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from vlm.config import DataConfig
from vlm.data import array_record
from vlm.data.clip_benchmark import write_texts
from vlm.data.evaluation_images import open_images
from vlm.data.example_reader import ExampleReader
from vlm.data.faults import BadSample
from vlm.data.near_duplicates import (
    MAX_DISTANCE,
    EqualIndex,
    HashIndex,
    SeenImages,
    SignatureIndex,
    Signatures,
    load_signatures,
    signatures_of,
    write_signatures,
)
from vlm.data.prepare_example import Embedder, Preparation, PreparedExample, make
from vlm.data.quality_filters import check_limits
from vlm.data.scores import digest_of
from vlm.data.shard_index import beside, write_index
from vlm.data.shard_writer import NOTE, ShardWriter
from vlm.data.sources import classes_of, open_source
from vlm.errors import ConfigError, DataError
from vlm.inputs.preprocess import Preprocess
from vlm.paths import as_path, is_remote

MANIFEST, TOTALS = "manifest.jsonl", "totals.json"
_SIGNATURES = "hashes"  # of written images, to detect duplicates after a resume
_REFERENCE = "evaluation"  # name of the signatures of the evaluation set
_AHEAD = 64  # examples in the thread pool


def prepare(
    config: DataConfig,
    split: str,
    out: epath.PathLike,
    wanted: Preparation,
    preprocess: Preprocess,
    *,
    embedder: Embedder | None = None,
    report: Callable[[int, int | None], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the examples of a split as shards into folder `out`, or resume a preparation.

    `report` is called with the number of examples read and the total. Returns totals: shards,
    examples, bytes, skipped samples by kind, and dropped features by name.

    Args:
        embedder: model for `wanted.max_similarity`.

    Raises:
        DataError: the source cannot be opened, or `out` has other files.
        ConfigError: invalid settings.
    """
    source = ExampleReader(config, split)
    folder, done = begin(config, split, out, wanted, embedder)
    place, read = (done[-1]["next"], done[-1]["read"]) if done else (None, 0)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        seen = seen_images(folder, wanted, done, preprocess, embedder, pool)
        results = _Lookahead(
            in_parallel(
                pool,
                lambda read: (make(read.example, config, wanted, preprocess, embedder), read.after),
                source.read(place),
            ),
            embedder,
            seen,
        )
        writer: ShardWriter | None = None
        try:
            for result, next_place in results:
                read += 1
                writer = writer or ShardWriter(folder, split, wanted, len(done))
                if isinstance(result, PreparedExample):
                    result = seen.fault(result.signatures) or result
                writer.add(result, read, next_place)
                if writer.examples == wanted.examples:
                    done.append(finish_shard(writer, folder, seen.kept))
                    writer = None
                    results.restart()
                if read % 256 == 0:
                    report(read, source.count)
            if writer is not None:
                done.append(finish_shard(writer, folder, seen.kept))
        finally:
            if writer is not None:
                writer.close()
    report(read, source.count)
    return finish(folder, split, wanted, done)


class _Lookahead:
    """Results in order, embedded in batches before they are needed.

    A batch never spans two shards, so that a resumed run has the same ones.
    """

    def __init__(
        self,
        results: Iterator[tuple[PreparedExample | BadSample, list[int]]],
        embedder: Embedder | None,
        seen: SeenImages,
    ):
        self._results, self._embedder, self._seen = results, embedder, seen
        self._pending: collections.deque[tuple[PreparedExample | BadSample, list[int]]] = (
            collections.deque()
        )
        self._embedded = 0  # of the pending results

    def __iter__(self) -> Iterator[tuple[PreparedExample | BadSample, list[int]]]:
        if self._embedder is None:
            yield from self._results
            return
        while True:
            if not self._embedded and not self._embed(self._embedder):
                return
            self._embedded -= 1
            yield self._pending.popleft()

    def restart(self) -> None:
        """Begin a new batch with the next result."""
        self._embedded = 0

    def _embed(self, embedder: Embedder) -> bool:
        """Embed the next batch; return whether there are more results."""
        good = sum(isinstance(result, PreparedExample) for result, _ in self._pending)
        while good < embedder.batch_size and (item := next(self._results, None)):
            self._pending.append(item)
            good += isinstance(item[0], PreparedExample)
        chosen = [
            (number, result, place)
            for number, (result, place) in enumerate(self._pending)
            if isinstance(result, PreparedExample)
        ]
        self._embedded = len(self._pending)
        if chosen:
            index = self._seen.kept[-1]
            found = embedder.embed(
                [result.pixels for _, result, _ in chosen if result.pixels is not None]
            )
            for (number, result, place), z in zip(chosen, found, strict=True):
                signatures = result.signatures | {index.name: z}
                self._pending[number] = result._replace(signatures=signatures), place
            self._seen.expect(index.name, found)
        return bool(self._pending)


def begin(
    config: DataConfig,
    split: str,
    out: epath.PathLike,
    wanted: Preparation,
    embedder: Embedder | None = None,
) -> tuple[epath.Path, list[dict[str, Any]]]:
    """Open the folder; return it and the manifest lines of finished shards."""
    if wanted.examples < 1 or not 1 <= wanted.quality <= 100:
        raise ConfigError(
            f"a shard of {wanted.examples} examples of quality {wanted.quality} is invalid: give "
            "at least 1 example, and a quality of 1 to 100"
        )
    check_limits(wanted)
    _check_comparisons(wanted, embedder)
    if wanted.form == "array_record":
        array_record.check_installed()
    folder = as_path(out)
    if is_remote(folder):
        raise DataError(f"{folder} is in a bucket: prepare into a local folder and copy it there")
    about = {"source": config.source, "split": split, **_settings(wanted)}
    if embedder is not None:
        about["model"] = embedder.identity
    about |= {"captions": config.captions, "label": config.label, "keep": config.filters}
    about |= {"scores": digest_of(config.scores)} if config.scores else {}
    names, templates = None, ()
    if wanted.form == "clip_benchmark" and config.label:
        source = open_source(config, split)
        about["labels"], names = classes_of(config, source)
        templates = getattr(source, "templates", None) or ()
    done = _open_folder(folder, json.loads(json.dumps(about, default=asdict)))
    if wanted.form == "clip_benchmark":
        write_texts(folder, names, templates)
    return folder, done


def _check_comparisons(wanted: Preparation, embedder: Embedder | None) -> None:
    distance = wanted.near_duplicates
    if distance is not None and not 0 <= distance <= MAX_DISTANCE:
        raise ConfigError(
            f"near_duplicates {distance} is no distance of hashes: give 0 to {MAX_DISTANCE} bits"
        )
    if (wanted.max_similarity is None) != (embedder is None):
        raise ConfigError("max_similarity and the model of the embeddings go together: set both")
    if wanted.against is not None and not wanted.compares_images:
        raise ConfigError(
            f"against {wanted.against!r} needs a comparison of images: set near_duplicates, "
            "max_similarity or deduplicate too"
        )


def _settings(wanted: Preparation) -> dict[str, Any]:
    """Return the settings for the note; later ones only if set, so that older folders resume."""
    defaults = Preparation()
    old = ("form", "examples", "short_side", "quality", "deduplicate", "min_side")
    settings = asdict(wanted)
    return {k: v for k, v in settings.items() if k in old or v != getattr(defaults, k)}


def indexes_of(wanted: Preparation, embedder: Embedder | None = None) -> list[SignatureIndex]:
    """Return empty indexes for the comparisons of a preparation."""
    indexes: list[SignatureIndex] = [EqualIndex()] if wanted.deduplicate else []
    if wanted.near_duplicates is not None:
        indexes.append(HashIndex(wanted.near_duplicates))
    return indexes if embedder is None else [*indexes, embedder.index()]


def seen_images(
    folder: epath.Path,
    wanted: Preparation,
    done: list[dict[str, Any]],
    preprocess: Preprocess,
    embedder: Embedder | None,
    pool: Executor,
) -> SeenImages:
    """Return the images of the finished shards, and of the evaluation set."""
    kept, stored = indexes_of(wanted, embedder), folder / _SIGNATURES
    for line in done:
        if line["file"]:
            load_signatures(stored, f"{line['shard']:05d}", kept)
    if wanted.against is None:
        return SeenImages(kept)
    reference = indexes_of(wanted, embedder)
    if not (stored / f"{_REFERENCE}.done").exists():
        images = open_images(wanted.against, wanted.against_split, wanted.against_image, preprocess)
        rows: list[Signatures] = []
        pixels: list[np.ndarray] = []

        def read(image: Callable[[], Image.Image]) -> tuple[Signatures, np.ndarray | None]:
            opened = image()
            own = signatures_of(opened, wanted.deduplicate, wanted.near_duplicates is not None)
            return own, None if embedder is None else embedder.pixels(opened)

        def embed() -> None:
            if embedder is not None and pixels:
                name = reference[-1].name
                for row, z in zip(rows[-len(pixels) :], embedder.embed(pixels), strict=True):
                    row[name] = z
                pixels.clear()

        for row, own in in_parallel(pool, read, images):
            rows.append(row)
            if embedder is not None and own is not None:
                pixels.append(own)
                if len(pixels) == embedder.batch_size:
                    embed()
        embed()
        write_signatures(stored, _REFERENCE, reference, rows)
        (stored / f"{_REFERENCE}.done").write_text(f"{len(rows)}\n")
    load_signatures(stored, _REFERENCE, reference)
    return SeenImages(kept, reference, wanted.against)


def finish(
    folder: epath.Path, split: str, wanted: Preparation, done: list[dict[str, Any]]
) -> dict[str, Any]:
    """Complete the folder after its last shard; return the totals."""
    files = [os.fspath(folder / line["file"]) for line in done if line["file"]]
    if wanted.form == "clip_benchmark" and files:
        (folder / split / "nshards.txt").write_text(f"{len(files)}\n")
        write_index(files, beside(files))
    found = totals(done)
    (folder / TOTALS).write_text(json.dumps(found, indent=2) + "\n")
    return found


def in_parallel(
    pool: Executor, function: Callable[[Any], Any], items: Iterator[Any]
) -> Iterator[Any]:
    """Apply a function in threads, some items ahead; yield the results in order."""
    running: collections.deque[Future] = collections.deque()
    for item in items:
        running.append(pool.submit(function, item))
        if len(running) > _AHEAD:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def finish_shard(
    writer: ShardWriter, folder: epath.Path, indexes: Sequence[SignatureIndex]
) -> dict[str, Any]:
    """Complete a shard, its signatures and its line of the manifest; return the line."""
    line = complete_shard(writer, folder, indexes)
    append_to_manifest(folder, [line])
    return line


def complete_shard(
    writer: ShardWriter, folder: epath.Path, indexes: Sequence[SignatureIndex]
) -> dict[str, Any]:
    """Complete a shard and its signatures; return its line, which is not in the manifest yet."""
    line = writer.finish()
    if line["file"] and indexes:
        write_signatures(folder / _SIGNATURES, f"{writer.number:05d}", indexes, writer.signatures)
    return line


def append_to_manifest(folder: epath.Path, lines: list[dict[str, Any]]) -> None:
    """Append lines to the manifest, which marks their shards as written."""
    with open(folder / MANIFEST, "a", encoding="utf-8") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)
        f.flush()
        os.fsync(f.fileno())


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
