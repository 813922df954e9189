"""Score the pairs of a data set by the cosine of image and text, to filter it (DFN, DataComp)."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float

from vlm import bundle
from vlm.config import DataConfig
from vlm.data.beam import pipeline, running
from vlm.data.example_reader import ExampleReader
from vlm.data.examples import SCORE, Example, captions_of
from vlm.data.faults import BadSample
from vlm.data.python_source import is_named
from vlm.data.scores import FILE, key_of, part_path, read_parts, write_part
from vlm.data.storage import exists, read_file, write_whole
from vlm.data.transform_example import open_image_of
from vlm.errors import ConfigError, DataError
from vlm.heads.model_identity import stored_facts
from vlm.paths import as_config_error, as_path

PART = 4096  # examples of a part, under random access: a killed command loses at most these
THREADS = 8  # that open images

Reduce = Literal["mean", "max", "first"]
_REDUCE: dict[str, Callable[[np.ndarray], np.floating]] = {"mean": np.mean, "max": np.max}


def score(
    data: DataConfig,
    split: str,
    out: str,
    model: str,
    *,
    reduce: Reduce = "mean",
    batch_size: int | None = None,
    beam: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the cosine of image and captions of every example to a folder of Parquet files.

    Calling it again with equal arguments continues after the finished parts, also after a kill.

    Args:
        out: an empty or new folder, or one that an interrupted call began.
        model: argument of `vlm.load`.
        reduce: of several captions: the mean or the largest of their cosines, or that of the first.
        beam: options of a Beam pipeline that scores the parts; its workers must share `out`.
        progress: called with the number of finished parts and the total.

    Returns:
        the contents of `scores.json`.

    Raises:
        ConfigError: the data is an object in Python, or a setting is invalid.
        DataError: the folder has other files or other scores, or no example can be scored.
        CheckpointError: there is no such model.
    """
    if is_named(data):
        raise ConfigError(
            f"{data.source} is a data set in Python, whose examples have no place to store a score "
            f"by: add a feature {SCORE!r} to its examples"
        )
    if data.mixture:
        raise ConfigError("a mixture has several sources: score each, and set scores of its part")
    size = (32 if jax.default_backend() == "cpu" else 256) if batch_size is None else batch_size
    if size < 1:
        raise ConfigError(f"batch_size {size} is too small: give at least 1")
    elsewhere = pipeline(beam) if beam else None
    loaded = bundle.load(model)
    reader = ExampleReader(data, split)
    parts = list(reader.ranges(PART))
    about = {
        "model": model,
        "facts": stored_facts(loaded),
        "source": data.source,
        "split": split,
        "image": data.image,
        "captions": [*data.captions] if data.label is None else [],
        "label": data.label,
        "reduce": reduce,
        "examples": reader.count,
        "parts": len(parts),
    }
    about = json.loads(json.dumps(about))  # as it is read from the file
    with as_config_error(f"{out} cannot be written", "give another folder"):
        if finished := _begin(out, about):
            return finished
        missing = [n for n in range(len(parts)) if not exists(part_path(out, n))]
        progress(len(parts) - len(missing), len(parts))
        if elsewhere is not None:
            _score_on_beam(elsewhere, missing, data, split, out, model, reduce, size)
            missing = [n for n in missing if not exists(part_path(out, n))]
        for number in missing:
            _score_part(loaded, reader, data, parts[number], out, number, reduce, size)
            done = len(parts) - len(missing) + missing.index(number) + 1
            progress(done, len(parts))
        return _finish(out, about)


def quantiles(out: str, shares: Sequence[float]) -> list[float]:
    """Return for each share the least score of so large a share of the scored examples.

    Raises:
        ConfigError: a share is not above 0 and at most 1.
        DataError: there are no scores.
    """
    for share in shares:
        if not 0 < share <= 1:
            raise ConfigError(f"a share of {share:g} is invalid: choose one above 0 and at most 1")
    scores = np.sort(_scores(out, json.loads(read_file(f"{out}/{FILE}"))["parts"]))[::-1]
    return [float(scores[max(0, round(share * len(scores)) - 1)]) for share in shares]


def _begin(out: str, about: dict[str, Any]) -> dict[str, Any] | None:
    """Open the folder; return `scores.json` if it is complete, else write it."""
    path = f"{out}/{FILE}"
    if exists(path):
        before = json.loads(read_file(path))
        differ = [name for name in about if before.get(name) != about[name]]
        if differ:
            raise DataError(
                f"{out} has scores with other {', '.join(differ)}: use the same settings, or give "
                "another folder"
            )
        return before if "digest" in before else None
    folder = as_path(out)
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{out} is not empty: give an empty or new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(about, indent=2) + "\n").encode())
    return None


def _finish(out: str, about: dict[str, Any]) -> dict[str, Any]:
    """Add the totals to `scores.json`, which marks the folder as complete."""
    digest = hashlib.sha256()
    for number in range(about["parts"]):
        digest.update(read_file(part_path(out, number)))
    tables = list(read_parts(out, about["parts"]))
    scores = _scores(out, about["parts"])
    if not len(scores):
        raise DataError(
            f"no example of {about['source']} can be scored: check it with vlm data show"
        )
    about = about | {
        "scored": len(scores),
        "unscored": sum(map(len, tables)) - len(scores),
        "mean": float(scores.mean(dtype=np.float64)),
        "digest": digest.hexdigest(),
    }
    write_whole(f"{out}/{FILE}", (json.dumps(about, indent=2) + "\n").encode())
    return about


def _scores(out: str, parts: int) -> Float[np.ndarray, " n"]:
    """Return all scores, without those of examples that have none."""
    columns = [table[SCORE].drop_null().to_numpy() for table in read_parts(out, parts)]
    return np.concatenate([np.empty(0, np.float32), *columns])


def _score_part(
    model: bundle.Bundle,
    reader: ExampleReader,
    data: DataConfig,
    part: tuple[list[int], int],
    out: str,
    number: int,
    reduce: Reduce,
    size: int,
) -> None:
    """Score the examples of a part, in batches of one shape, and write it."""
    keys: list[str] = []
    scores: dict[int, float] = {}  # by row of the part
    images: list[tuple[int, np.ndarray, list[str]]] = []  # of the next batch

    def encode() -> None:
        if images:
            rows, pixels, texts = zip(*images, strict=True)
            scores.update(zip(rows, _cosines(model, pixels, texts, reduce, size), strict=True))
            images.clear()

    def prepare(example: Example | BadSample) -> tuple[str, np.ndarray, list[str]] | str | None:
        """Return key, pixels and captions; the key alone if it has no score, None without key."""
        if isinstance(example, BadSample):
            return None
        key = key_of(example, data)
        try:
            captions = captions_of(example, data)
            image = open_image_of(example, data, model.preprocess, key)
            return key, model.preprocess.pixels(image), captions
        except BadSample:
            return key

    with ThreadPoolExecutor(THREADS) as pool:
        for chunk in _chunks(reader.read(*part), size):
            for found in pool.map(prepare, chunk):
                if found is None:
                    continue
                keys.append(found if isinstance(found, str) else found[0])
                if not isinstance(found, str):
                    images.append((len(keys) - 1, *found[1:]))
                if len(images) == size:
                    encode()
        encode()
    write_part(out, number, [(key, scores.get(row)) for row, key in enumerate(keys)])


def _chunks(reads: Iterator[Any], size: int) -> Iterator[list[Example | BadSample]]:
    chunk: list[Example | BadSample] = []
    for read in reads:
        chunk.append(read.example)
        if len(chunk) == size:
            yield chunk
            chunk = []
    yield chunk


def _cosines(
    model: bundle.Bundle,
    pixels: Sequence[np.ndarray],
    texts: Sequence[list[str]],
    reduce: Reduce,
    size: int,
) -> list[float]:
    """Score up to `size` images with their captions; shorter batches are padded."""
    batch = model.preprocess.blank(size)
    for row in range(size):
        model.preprocess.put(batch, row, pixels[min(row, len(pixels) - 1)])
    z_image = model.encode_pixels(batch)[: len(pixels)]
    used = [captions[:1] if reduce == "first" else captions for captions in texts]
    flat = [(row, text) for row, captions in enumerate(used) for text in captions]
    values: list[list[float]] = [[] for _ in texts]
    for first in range(0, len(flat), size):
        part = flat[first : first + size]
        padded = [text for _, text in part] + [part[-1][1]] * (size - len(part))
        z_text = model.encode_tokens(model.tokenizer(padded))
        for (row, _), z in zip(part, z_text, strict=False):
            values[row].append(float(np.dot(z_image[row], z)))
    return [float(_REDUCE.get(reduce, np.mean)(np.array(found))) for found in values]


def _score_on_beam(
    made: Any,
    numbers: list[int],
    data: DataConfig,
    split: str,
    out: str,
    model: str,
    reduce: Reduce,
    size: int,
) -> None:
    """Score parts with a Beam pipeline."""
    import apache_beam as beam

    with running(made):
        _ = (
            made
            | beam.Create(numbers)
            | beam.Reshuffle()
            | beam.Map(lambda n: _score_number(n, data, split, out, model, reduce, size))
        )


def _score_number(
    number: int, data: DataConfig, split: str, out: str, model: str, reduce: Reduce, size: int
) -> None:
    """Score part `number` in a Beam worker."""
    loaded, reader, parts = _open_inputs(data, split, model)
    _score_part(loaded, reader, data, parts[number], out, number, reduce, size)


@functools.lru_cache(1)
def _open_inputs(data: DataConfig, split: str, model: str) -> tuple[Any, ExampleReader, list]:
    """Load the model and open the data, once in each Beam worker."""
    reader = ExampleReader(data, split)
    return bundle.load(model), reader, list(reader.ranges(PART))
