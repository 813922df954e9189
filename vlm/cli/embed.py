"""`vlm embed`: write the embeddings of images to a file or a folder."""

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

from vlm.cli import options, runtime
from vlm.cli.model import leading_model, model_name
from vlm.cli.parse import UsageError
from vlm.errors import DataError

SUFFIXES = (".npz", ".safetensors")
PART = 16_384  # images of a part: a killed command loses at most these
PLAN = "vlm-embed.json"  # in the folder of the parts: model, images and part size


def embed(
    images_and_out: Annotated[tuple[str, ...], arg(metavar="IMAGES... OUT")],
    /,
    model: options.ModelOption = None,
    batch_size: options.BatchSize = None,
    beam: options.Beam = (),
    video: options.Video = None,
) -> None:
    """Write the embeddings of images to a file: float32 rows of unit norm, and their ids.

    The id of an image is its path. Unreadable images are reported and skipped; the exit code is
    then 1. An .npz holds the arrays "embeddings" and "ids"; a .safetensors holds "embeddings", and
    the ids as a JSON list in its metadata. Any other OUT is a folder in the format of
    clip-retrieval: img_emb/img_emb_0.npy, metadata/metadata_0.parquet, and so on.

    Memory is bounded by a few thousand images. An interrupted command resumes when it is run again.

    Examples:
      vlm embed photos/ photos.npz
      vlm embed a.png "more/*.jpg" out.safetensors
      vlm embed photos/ photo-embeddings/ --model ViT-L-14
      vlm embed clips/ clips.npz --video 8
      vlm embed photos/ out/ --beam runner=FlinkRunner flink_master=host:8081

    Args:
        images_and_out: files, folders (searched recursively) and globs, then a file that ends in
            .npz or .safetensors, or a folder.
    """
    model, places = leading_model("vlm embed", model, images_and_out, 2)
    *images, out = places or ("",)
    if not images:
        raise UsageError("vlm embed needs images and an output file: vlm embed IMAGES OUT")
    as_file = out.endswith(SUFFIXES)
    parts = Path(f"{out}.partial" if as_file else out)
    if parts.is_file() or (parts.is_dir() and any(parts.iterdir()) and not _plan(parts)):
        raise UsageError(
            f"the last argument, {out!r}, is where embeddings go, and something else is there: "
            f"name a new folder, or a file that ends in {' or '.join(SUFFIXES)}"
        )
    embed_elsewhere = None
    if beam:
        if video is not None:
            raise UsageError("--video runs on this machine: leave out --beam")
        from vlm.data.beam import pipeline

        embed_elsewhere = functools.partial(
            _embed_with_beam, pipeline(beam), model_name(model), images, batch_size
        )
    runtime.prepare_inference()
    from vlm.cli.images import Unreadable, find_inputs
    from vlm.cli.terminal import print_status

    paths, bundle = find_inputs(images, model, video)
    unreadable = Unreadable(len(paths))
    kept = embed_parts(bundle, paths, parts, batch_size, unreadable, embed_elsewhere)
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
    embed_elsewhere: Callable[[Path, str, list[int]], None] | None = None,
) -> int:
    """Embed images into a folder of parts, except finished ones; return the number embedded.

    `embed_elsewhere` gets the folder, the hash of the images and the numbers of the missing parts;
    it may write some of them.

    Raises:
        DataError: the folder holds parts of other images or another model.
    """
    from vlm.cli.terminal import progress
    from vlm.heads.model_identity import stored_facts

    digest = _digest(paths)
    plan = {"model": stored_facts(bundle, "image"), "images": digest, "part": PART}
    there = _plan(folder)
    if there and there != plan:
        raise DataError(
            f"{folder} holds embeddings of other images, of images that changed since, or of "
            "another model: remove it or give another path"
        )
    os.makedirs(folder, exist_ok=True)
    try:
        (folder / PLAN).write_text(json.dumps(plan), encoding="utf-8")
        if embed_elsewhere is not None:
            numbers = range(-(-len(paths) // PART))
            embed_elsewhere(folder, digest, [n for n in numbers if _ids(folder, n) is None])
        kept, shown = 0, progress(paths, "encoding", len(paths))
        for number, start in enumerate(range(0, len(paths), PART)):
            part = paths[start : start + PART]
            done = _ids(folder, number)
            if done is not None:
                unreadable.add_earlier(set(map(_id, part)) - set(done))
                for _ in part:
                    next(shown)
            else:
                stream = (next(shown) for _ in part)
                done = _embed_part(bundle, part, stream, folder, number, batch_size, unreadable)
            kept += len(done)
        return kept
    except BaseException:
        if not any(folder.glob("metadata/*.parquet")):  # nothing to resume from
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
    """Write one part, whose images come from `stream`; return the ids of the readable ones."""
    from vlm.heads.exchange import PATH, write_partition

    z = bundle.encode_image(stream, batch_size, on_error=unreadable.handler(part))
    done = [_id(path) for path in unreadable.readable(part)]
    write_partition(folder, number, z, {PATH: done})
    return done


def _embed_with_beam(
    pipeline: Any,
    model: str,
    images: list[str],
    batch_size: int | None,
    folder: Path,
    digest: str,
    numbers: list[int],
) -> None:
    """Write parts with a Beam pipeline; unreadable images are missing from their part."""
    import apache_beam as beam

    from vlm.data.beam import running

    size = PART
    with running(pipeline):
        _ = (
            pipeline
            | beam.Create(numbers)
            | beam.Reshuffle()
            | beam.Map(
                lambda n: _embed_number(n, size, model, tuple(images), digest, folder, batch_size)
            )
        )


def _embed_number(
    number: int,
    size: int,
    model: str,
    images: tuple[str, ...],
    digest: str,
    folder: Path,
    batch_size: int | None,
) -> None:
    """Write part `number`, of `size` images, in a Beam worker."""
    from vlm.cli.images import Unreadable

    bundle, paths = _open_inputs(model, images, digest)
    part = paths[number * size :][:size]
    _embed_part(bundle, part, part, folder, number, batch_size, Unreadable(len(paths)))


@functools.lru_cache(1)
def _open_inputs(model: str, images: tuple[str, ...], digest: str) -> tuple[Any, list[Any]]:
    """Load the model and list the images, once in each Beam worker."""
    runtime.prepare_inference()
    from vlm.bundle import load
    from vlm.cli.images import find_images

    paths = find_images(images)
    if _digest(paths) != digest:
        raise DataError(
            f"a worker found other images in {' '.join(images)} than the command: give a place "
            "that is the same on all machines, and do not change it meanwhile"
        )
    return load(model), paths


def _digest(paths: list[Any]) -> str:
    """Hash a list of images: their paths, sizes and modification times."""
    from vlm.cli.images import state_of

    rows = "\n".join(f"{_id(path)} {state_of(path)}" for path in paths)
    return hashlib.sha256(rows.encode()).hexdigest()


def _id(path: Any) -> str:
    """Return the id of an image: its path, with bytes that are not UTF-8 escaped."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode()


def _plan(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _ids(folder: Path, number: int) -> list[str] | None:
    """Return the ids of a part; None if it is unfinished (metadata is written last)."""
    from vlm.heads.exchange import PATH

    file = folder / "metadata" / f"metadata_{number}.parquet"
    if not file.is_file():
        return None
    import pyarrow.parquet

    return pyarrow.parquet.read_table(file, columns=[PATH]).column(PATH).to_pylist()


def _join(folder: Path, out: str, count: int, width: int) -> None:
    """Join the parts to one file, which appears when it is complete."""
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
