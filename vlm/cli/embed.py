"""`vlm embed`: images to embeddings in a file, or a folder, that any program reads."""

import functools
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import arg

from vlm.cli import parse, runtime
from vlm.cli.parse import UsageError
from vlm.errors import DataError

SUFFIXES = (".npz", ".safetensors")
PART = 16_384  # images that are encoded before they are kept: what a kill costs at most
PLAN = "vlm-embed.json"  # in the folder of the parts: what they are of


def main(args: list[str]) -> None:
    parse.call(embed, "vlm embed", args)


def embed(
    model: Annotated[str, arg(metavar="MODEL")],
    images_and_out: Annotated[tuple[str, ...], arg(metavar="IMAGES... OUT")],
    /,
    batch_size: int | None = None,
    beam: tuple[str, ...] = (),
) -> None:
    """Write the embeddings of images to a file: float32 rows of unit norm, and an id for each.

    The id is the image's path. An image that cannot be read is named and left out, and the command
    fails at its end. An .npz holds the arrays "embeddings" and "ids"; a .safetensors
    holds "embeddings", and the ids as a JSON list in its metadata. Any other OUT is a folder in the
    form of clip-retrieval: img_emb/img_emb_0.npy and metadata/metadata_0.parquet, and so on.

    Millions of images take the memory of a few thousand. A command that was killed goes on where it
    was when it is run again.

    Examples:
      vlm embed runs/openmoji photos/ photos.npz
      vlm embed runs/openmoji a.png "more/*.jpg" out.safetensors
      vlm embed runs/openmoji photos/ photo-embeddings/
      vlm embed runs/openmoji photos/ out/ --beam runner=FlinkRunner flink_master=host:8081

    Args:
        model: a run folder, a bundle, or a public checkpoint.
        images_and_out: files, folders (searched whole) and globs; and last a file that ends in .npz
            or .safetensors, which is written whole or not at all, or a folder.
        batch_size: images encoded at once; None leaves it to the model.
        beam: options of Apache Beam (extra `beam`), as NAME=VALUE: its workers, who must all see
            model, images and OUT, encode parts of the images, each as this command would.
    """
    *images, out = images_and_out or ("",)
    if not images:
        raise UsageError("vlm embed needs images and a file to write: vlm embed MODEL IMAGES OUT")
    as_file = out.endswith(SUFFIXES)
    parts = Path(f"{out}.partial" if as_file else out)
    if parts.is_file() or (parts.is_dir() and any(parts.iterdir()) and not _plan(parts)):
        raise UsageError(
            f"the last argument, {out!r}, is where embeddings go, and something else is there: "
            f"name a new folder, or a file that ends in {' or '.join(SUFFIXES)}"
        )
    made_elsewhere = None
    if beam:
        from vlm.data.beam import pipeline

        made_elsewhere = functools.partial(_embed_on, pipeline(beam), model, images, batch_size)
    runtime.prepare_inference()
    from vlm.bundle import load
    from vlm.cli.images import Unreadable, find_images
    from vlm.cli.terminal import print_status

    paths = find_images(images)
    bundle = load(model)
    unreadable = Unreadable(len(paths))
    kept = embed_parts(bundle, paths, parts, batch_size, unreadable, made_elsewhere)
    if kept and as_file:
        _join(parts, out, kept, bundle.embed_dim)
    if as_file:
        shutil.rmtree(parts)
    if kept:
        print_status(f"{kept:,} embeddings of {bundle.embed_dim} dimensions in {out}")
    unreadable.finish()


def embed_parts(
    bundle: Any,
    paths: list[Any],
    folder: Path,
    batch_size: int | None,
    unreadable: Any,
    made_elsewhere: Callable[[Path, str, list[int]], None] | None = None,
) -> int:
    """Embed images into a folder of parts, those left out that are there; how many could be read.

    `made_elsewhere` is given the folder, what identifies the images and the numbers of the parts
    that lack, and makes some of them first.

    Raises:
        DataError: the folder holds parts of other images or another model.
    """
    from vlm.cli.terminal import progress
    from vlm.heads.model_identity import stored_facts

    listed = _listed(paths)
    plan = {"model": stored_facts(bundle, "image"), "images": listed, "part": PART}
    there = _plan(folder)
    if there and there != plan:
        raise DataError(
            f"{folder} holds embeddings of other images, of images that changed since, or of "
            "another model: remove it or name another place"
        )
    os.makedirs(folder, exist_ok=True)
    try:
        (folder / PLAN).write_text(json.dumps(plan), encoding="utf-8")
        if made_elsewhere is not None:
            numbers = range(-(-len(paths) // PART))
            made_elsewhere(folder, listed, [n for n in numbers if _ids(folder, n) is None])
        kept, shown = 0, progress(paths, "encoding", len(paths))
        for number, start in enumerate(range(0, len(paths), PART)):
            part = paths[start : start + PART]
            done = _ids(folder, number)
            if done is not None:
                unreadable.found_before(set(map(_id, part)) - set(done))
                for _ in part:
                    next(shown)
            else:
                stream = (next(shown) for _ in part)
                done = _embed_part(bundle, part, stream, folder, number, batch_size, unreadable)
            kept += len(done)
        return kept
    except BaseException:
        if not any(folder.glob("metadata/*.parquet")):  # nothing to go on from
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _embed_part(
    bundle: Any,
    part: list[Any],
    stream: Iterable[Any],
    folder: Path,
    number: int,
    batch_size: int | None,
    unreadable: Any,
) -> list[str]:
    """Write one part, whose images come by `stream`; the ids of those that could be read."""
    from vlm.heads.exchange import PATH, write_partition

    z = bundle.encode_image(stream, batch_size, on_error=unreadable.among(part))
    done = [_id(path) for path in unreadable.others(part)]
    write_partition(folder, number, z, {PATH: done})
    return done


def _embed_on(
    pipeline: Any,
    model: str,
    images: list[str],
    batch_size: int | None,
    folder: Path,
    listed: str,
    numbers: list[int],
) -> None:
    """Write parts by a Beam pipeline; an image that cannot be read is missing in its part."""
    import apache_beam as beam

    from vlm.data.beam import running

    size = PART
    with running(pipeline):
        _ = (
            pipeline
            | beam.Create(numbers)
            | beam.Reshuffle()
            | beam.Map(
                lambda n: _embed_number(n, size, model, tuple(images), listed, folder, batch_size)
            )
        )


def _embed_number(
    number: int,
    size: int,
    model: str,
    images: tuple[str, ...],
    listed: str,
    folder: Path,
    batch_size: int | None,
) -> None:
    """Write part `number`, of `size` images, in a worker."""
    from vlm.cli.images import Unreadable

    bundle, paths = _opened(model, images, listed)
    part = paths[number * size :][:size]
    _embed_part(bundle, part, part, folder, number, batch_size, Unreadable(len(paths)))


@functools.lru_cache(1)
def _opened(model: str, images: tuple[str, ...], listed: str) -> tuple[Any, list[Any]]:
    """The model and the images, once in each worker."""
    runtime.prepare_inference()
    from vlm.bundle import load
    from vlm.cli.images import find_images

    paths = find_images(images)
    if _listed(paths) != listed:
        raise DataError(
            f"a worker finds other images in {' '.join(images)} than the command does: name a "
            "place that all machines see alike, and change nothing in it meanwhile"
        )
    return load(model), paths


def _listed(paths: list[Any]) -> str:
    """What identifies a list of images: their paths, sizes and times of writing."""
    from vlm.cli.images import state_of

    rows = "\n".join(f"{_id(path)} {state_of(path)}" for path in paths)
    return hashlib.sha256(rows.encode()).hexdigest()


def _id(path: Any) -> str:
    """The id of an image: its path, whose bytes that are no UTF-8 are written out."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode()


def _plan(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _ids(folder: Path, number: int) -> list[str] | None:
    """The ids of a part, if it was finished: its metadata is written last."""
    from vlm.heads.exchange import PATH

    file = folder / "metadata" / f"metadata_{number}.parquet"
    if not file.is_file():
        return None
    import pyarrow.parquet

    return pyarrow.parquet.read_table(file, columns=[PATH]).column(PATH).to_pylist()


def _join(folder: Path, out: str, count: int, width: int) -> None:
    """The parts as one file, a part at a time; a reader never sees half of it."""
    numbers = range(len(list((folder / "metadata").glob("*.parquet"))))
    ids = [name for number in numbers for name in _ids(folder, number) or []]

    def rows() -> Iterator[bytes]:
        for number in numbers:
            yield np.load(folder / "img_emb" / f"img_emb_{number}.npy").tobytes()

    partial = folder / "whole"
    if out.endswith(".npz"):
        with zipfile.ZipFile(partial, "w", allowZip64=True) as file:
            with file.open("embeddings.npy", "w", force_zip64=True) as member:
                header = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
                np.lib.format.write_array_header_1_0(member, header)
                for block in rows():
                    member.write(block)
            with file.open("ids.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.array(ids), allow_pickle=False)
    else:
        about = {"dtype": "F32", "shape": [count, width], "data_offsets": [0, 4 * count * width]}
        head = {"__metadata__": {"ids": json.dumps(ids)}, "embeddings": about}
        text = json.dumps(head).encode()
        text += b" " * (-len(text) % 8)
        with open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for block in rows():
                file.write(block)
    os.replace(partial, out)
