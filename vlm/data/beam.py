"""`vlm data prepare` on Apache Beam: many machines write shards that are equal byte for byte.

Workers open the source by its config and process ranges of it. Results are sent in chunks, numbered
in the order of the source. Equal images are grouped by key; near duplicates, which depend on all
images before, are found by one worker from their signatures. The counts of all chunks determine
the shard of every example, independent of the worker.
"""

import contextlib
import functools
import io
import itertools
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from vlm.config import DataConfig, PreprocessConfig
from vlm.data import prepare as plain
from vlm.data.example_reader import ExampleReader
from vlm.data.faults import BadSample
from vlm.data.near_duplicates import EqualIndex, Signatures
from vlm.data.prepare_example import Preparation, PreparedExample, make
from vlm.data.shard_writer import ShardWriter
from vlm.errors import ConfigError, DataError
from vlm.inputs.preprocess import Preprocess

CHUNK = 256  # examples per chunk

Place = tuple[int, int]  # of a chunk: range of the source, number in it
# Examples read, result, next read position.
Row = tuple[int, PreparedExample | BadSample, list[int]]
Item = tuple[PreparedExample | BadSample, list[int]]  # a result, and the next example's place


def pipeline(options: Sequence[str]) -> Any:
    """Make a Beam pipeline with options such as `runner=DirectRunner`; ConfigError if it cannot."""
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise ConfigError("Apache Beam is not installed: run pip install 'vlm-jax[beam]'") from None
    if wrong := [option for option in options if "=" not in option]:
        raise ConfigError(f"--beam {wrong[0]} is not an option of Beam: write NAME=VALUE")
    output = io.StringIO()  # of argparse: usage, and then the error
    try:
        with contextlib.redirect_stderr(output):
            given = PipelineOptions([f"--{option}" for option in options])
            given.get_all_options()  # parses the values now, not at the end
            return apache_beam.Pipeline(options=given)
    except (ValueError, SystemExit) as error:
        why = output.getvalue() or str(error)
        raise ConfigError(
            f"Beam rejects --beam {' '.join(options)} ({why.strip().splitlines()[-1]})"
        ) from None


@contextlib.contextmanager
def running(pipeline: Any) -> Iterator[None]:
    """Context to build a pipeline in. It runs on exit; DataError if a worker fails."""
    try:
        with pipeline:
            yield
    except RuntimeError as error:  # its message is the traceback of the worker
        last = str(error).strip().splitlines()[-1]
        raise DataError(f"a worker of the Beam pipeline failed ({last[:500]})") from error


def prepare(
    config: DataConfig, split: str, out: epath.PathLike, wanted: Preparation, options: Sequence[str]
) -> dict[str, Any]:
    """Run `vlm.data.prepare.prepare` as a Beam pipeline; all workers must share the folder `out`.

    The manifest is written after all shards, so a stopped pipeline restarts from the beginning.

    Raises:
        DataError: the source cannot be opened, `out` has other files or shards already, or a worker
            failed.
        ConfigError: invalid sizes, or options that Beam rejects.
    """
    if wanted.max_similarity is not None:
        raise ConfigError(
            "max_similarity compares each embedding with all earlier ones, in order, which is not "
            "possible on Beam: go on without --beam, or use near_duplicates"
        )
    made = pipeline(options)
    import apache_beam as beam

    ExampleReader(config, split)  # raises errors of the source here, not in a worker
    folder, done = plain.begin(config, split, out, wanted)
    if done:
        raise DataError(f"{folder} has shards already: go on without --beam, or name a new folder")
    with running(made):
        chunks = (
            made
            | "split" >> beam.Create([0])
            | "ranges" >> beam.FlatMap(lambda _: _source(config, split).ranges(CHUNK))
            | "to all workers" >> beam.Reshuffle()
            | "make" >> beam.FlatMap(lambda part: _chunks(part, config, split, wanted))
        )
        if wanted.near_duplicates is not None or wanted.against is not None:
            skipped = (
                chunks
                | "signatures" >> beam.FlatMap(_signatures)
                | "all signatures" >> beam.combiners.ToList()
                | "in order" >> beam.FlatMap(lambda rows: _duplicates(rows, folder, wanted))
            )
            chunks = _leave_out(chunks, skipped)
        elif wanted.deduplicate:
            repeated = (
                chunks
                | "duplicate keys" >> beam.FlatMap(_duplicate_keys)
                | "by duplicate key" >> beam.GroupByKey()
                | "all but the first" >> beam.FlatMap(_repeated)
            )
            chunks = _leave_out(chunks, repeated)
        starts = (
            chunks
            | "count" >> beam.Map(_counts)
            | "all counts" >> beam.combiners.ToList()
            | "add up" >> beam.Map(_starts)
        )
        _ = (
            chunks
            | "place"
            >> beam.FlatMap(
                lambda chunk, starts: _placed(chunk, starts, wanted.examples),
                beam.pvalue.AsSingleton(starts),
            )
            | "by shard" >> beam.GroupByKey()
            | "write" >> beam.Map(lambda shard: _write(shard, folder, split, wanted))
            | "all lines" >> beam.combiners.ToList()
            | "manifest"
            >> beam.Map(
                lambda lines: plain.append_to_manifest(
                    folder, sorted(lines, key=lambda x: x["shard"])
                )
            )
        )
    return plain.finish(folder, split, wanted, plain.finished(folder))


@functools.lru_cache(1)
def _source(config: DataConfig, split: str) -> ExampleReader:
    """Open the source once per worker."""
    return ExampleReader(config, split)


def _chunks(
    part: tuple[list[int], int], config: DataConfig, split: str, wanted: Preparation
) -> Iterator[tuple[Place, list[Item]]]:
    """Process a range of the source; yield the results in chunks."""
    place, end = part
    preprocess = Preprocess(PreprocessConfig())
    reads = _source(config, split).read(place, end)
    for number in itertools.count():
        batch = list(itertools.islice(reads, CHUNK))
        if not batch:
            return
        items = [(make(r.example, config, wanted, preprocess), r.after) for r in batch]
        yield (place[0], number), items


def _signatures(
    chunk: tuple[Place, list[Item]],
) -> Iterator[tuple[Place, int, Signatures]]:
    """Yield the place of each image, with its signatures."""
    place, items = chunk
    for row, (result, _) in enumerate(items):
        if isinstance(result, PreparedExample):
            yield place, row, result.signatures


def _duplicate_keys(chunk: tuple[Place, list[Item]]) -> Iterator[tuple[bytes, tuple[Place, int]]]:
    """Yield the place of each image, by its duplicate key."""
    for place, row, signatures in _signatures(chunk):
        yield signatures[EqualIndex.name], (place, row)


def _repeated(found: tuple[bytes, Any]) -> Iterator[tuple[Place, tuple[int, BadSample]]]:
    """Yield all but the first of the places of one image."""
    duplicate = BadSample(EqualIndex.kind, "", f"{EqualIndex.kind} of an earlier image")
    for place, row in sorted(found[1])[1:]:
        yield place, (row, duplicate)


def _duplicates(
    rows: list[tuple[Place, int, Signatures]], folder: epath.Path, wanted: Preparation
) -> Iterator[tuple[Place, tuple[int, BadSample]]]:
    """Yield the images that `SeenImages` skips; each depends on all images before it."""
    with ThreadPoolExecutor() as pool:
        seen = plain.seen_images(folder, wanted, [], Preprocess(PreprocessConfig()), None, pool)
    for place, row, signatures in sorted(rows, key=lambda found: found[:2]):
        if (fault := seen.fault(signatures)) is not None:
            yield place, (row, fault)


def _leave_out(chunks: Any, skipped: Any) -> Any:
    """Replace the results at the skipped places by their faults."""
    import apache_beam as beam

    return (
        {"items": chunks, "skipped": skipped}
        | "by chunk" >> beam.CoGroupByKey()
        | "without duplicates" >> beam.Map(_without)
    )


def _without(joined: tuple[Place, dict[str, Any]]) -> tuple[Place, list[Item]]:
    place, parts = joined
    (items,), skipped = parts["items"], dict(parts["skipped"])
    return place, [
        (skipped.get(row, result), next_place) for row, (result, next_place) in enumerate(items)
    ]


def _counts(chunk: tuple[Place, list[Item]]) -> tuple[Place, int, int]:
    """Count the examples of a chunk, and those to write."""
    place, items = chunk
    return place, len(items), sum(isinstance(result, PreparedExample) for result, _ in items)


def _starts(counts: list[tuple[Place, int, int]]) -> dict[Place, tuple[int, int]]:
    """Return how many examples were read and written before each chunk."""
    starts, read, kept = {}, 0, 0
    for place, more_read, more_kept in sorted(counts):
        starts[place] = read, kept
        read, kept = read + more_read, kept + more_kept
    return starts


def _placed(
    chunk: tuple[Place, list[Item]], starts: dict[Place, tuple[int, int]], examples: int
) -> Iterator[tuple[int, Row]]:
    """Yield each example with its shard and number; a skipped one counts to the next shard."""
    place, items = chunk
    read, kept = starts[place]
    for result, next_place in items:
        read += 1
        yield kept // examples, (read, result, next_place)
        kept += isinstance(result, PreparedExample)


def _write(
    shard: tuple[int, Any], folder: epath.Path, split: str, wanted: Preparation
) -> dict[str, Any]:
    number, found = shard
    unfinished = f".{uuid.uuid4().hex}.part"  # a runner may start one shard twice
    writer = ShardWriter(folder, split, wanted, number, unfinished)
    for read, result, place in sorted(found, key=lambda row: row[0]):
        writer.add(result, read, place)
    return plain.complete_shard(writer, folder, plain.indexes_of(wanted))
