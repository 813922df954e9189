"""`vlm index`: build a search index of images."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from tyro.conf import arg

from vlm._json import parse
from vlm.cli import options, runtime
from vlm.cli.model import leading_model
from vlm.cli.parse import UsageError
from vlm.errors import CheckpointError, ConflictError

SAVE_EVERY = 16_384  # images encoded between two saves: a killed command loses at most these
STATE = ("bytes", "modified")  # metadata columns that show whether an image has changed
MODEL_FILE = "model.json"  # beside the index: MODEL, so that a search can load it


def index(
    images_and_out: Annotated[tuple[str, ...], arg(metavar="IMAGES... OUT")],
    /,
    model: options.ModelOption = None,
    dtype: Literal["float32", "float16"] = "float32",
    coding: Literal["int8", "binary"] | None = None,
    batch_size: options.BatchSize = None,
    rebuild: bool = False,
    video: options.Video = None,
) -> None:
    """Build an index that `vlm search` opens; it records its model.

    If OUT already holds an index of the same model and kind, it is updated: new and changed images
    are encoded (by size and modification time), and missing ones removed. Any other index is
    replaced after the new one is complete. Unreadable images are reported and skipped; the exit
    code is then 1. The id of an image is its absolute path.

    Example:
      vlm index photos/ my-index
      vlm search my-index "a red car in the snow"
      vlm index clips/ my-videos --video 8

    Args:
        images_and_out: files, folders (searched recursively) and globs, then the folder of the
            index.
        dtype: type of the stored embeddings; float16 halves the file and changes scores by under
            1e-3.
        coding: search by codes a quarter (int8) or a thirty-second (binary) as large, which are all
            that has to fit in memory; the best candidates are then scored exactly.
        rebuild: ignore an existing index at OUT and re-encode everything.
    """
    model, places = leading_model("vlm index", model, images_and_out, 2)
    *images, out = places or ("",)
    if not images:
        raise UsageError("vlm index needs images and an output folder: vlm index IMAGES OUT")
    from vlm.heads import index_folder

    folder = index_folder.local_folder(out)
    if folder.exists() and not is_index(folder) and (folder.is_file() or any(folder.iterdir())):
        raise UsageError(
            f"the last argument, {out!r}, is where the index goes, and something else is there "
            "already: name a new folder"
        )
    runtime.prepare_inference()
    from vlm.cli.images import find_inputs
    from vlm.cli.terminal import print_status

    kind = {"dtype": dtype, "coding": coding, "rebuild": rebuild}
    paths, bundle = find_inputs(images, model, video, absolute=True)
    built = update_index(folder, bundle, paths, batch_size=batch_size, **kind)
    print_status(f"{built.counts(out)}; search them with: vlm search {out} QUERY")
    built.unreadable.finish()


class BuiltIndex(NamedTuple):
    """An index after an update: what changed, and the images that could not be read."""

    index: Any
    unreadable: Any
    encoded: int
    removed: int

    def counts(self, place: str) -> str:
        """Describe the update in a line."""
        changes = f"{self.encoded:,} encoded, {self.removed:,} removed"
        return f"{len(self.index):,} images in {place} ({changes})"


def update_index(
    folder: Path,
    bundle: Any,
    paths: Sequence[Any],
    *,
    dtype: Literal["float32", "float16"] = "float32",
    coding: Literal["int8", "binary"] | None = None,
    batch_size: int | None = None,
    rebuild: bool = False,
) -> BuiltIndex:
    """Bring the index at `folder` up to date with the images at `paths`, and save it.

    An index of the same model and kind is updated: only new and changed files are encoded. Any
    other one is replaced.

    Raises:
        DataError: no image can be read.
        ConflictError: another process saved to the folder meanwhile.
    """
    from vlm.cli.images import Unreadable, state_of
    from vlm.cli.terminal import progress
    from vlm.heads.retrieval import RetrievalIndex

    target = None if rebuild else _compatible_index(folder, bundle, dtype, coding)
    grows, replaces = (
        target is not None or not is_index(folder),
        is_index(folder) and target is None,
    )
    target = target or RetrievalIndex(bundle, dtype, coding)
    unreadable = Unreadable(len(paths))
    state = {os.fspath(path): state_of(path) for path in paths}
    columns = target.columns
    held = zip(*(columns.get(name, ()) for name in STATE), strict=True)
    known = dict(zip(target.ids, held, strict=False))
    gone = [name for name in target.ids if name not in state]
    target.remove(gone)
    changed = [path for path in paths if known.get(os.fspath(path)) != state[os.fspath(path)]]
    shown = progress(changed, "encoding", len(changed))
    for start in range(0, len(changed), SAVE_EVERY):
        part = changed[start : start + SAVE_EVERY]
        of_part = [state[os.fspath(path)] for path in part]
        metadata: dict[str, Any] = dict(zip(STATE, zip(*of_part, strict=True), strict=True))
        stream = (next(shown) for _ in part)
        target.update(stream, None, batch_size, metadata, on_error=unreadable.handler(part))
        if grows and len(target) and start + SAVE_EVERY < len(changed):
            _save(target, folder, replaces)
    # A changed file that is unreadable now must not keep its old embedding.
    bad = {os.fspath(p) for p in changed} - {os.fspath(p) for p in unreadable.readable(changed)}
    stale = [name for name in bad if name in target]
    target.remove(stale)
    if not len(target):
        unreadable.finish()
    if len(changed) > len(bad) or gone or stale or replaces or not is_index(folder):
        _save(target, folder, replaces)
    return BuiltIndex(target, unreadable, len(changed) - len(bad), len(gone))


def _compatible_index(folder: Path, bundle: Any, dtype: str, coding: str | None) -> Any:
    """Open the index at `folder` if it can be updated; else print the reason, and return None."""
    from vlm.cli.terminal import print_status
    from vlm.heads.retrieval import RetrievalIndex

    if not is_index(folder):
        return None
    try:
        there = RetrievalIndex.load(folder, bundle)
    except CheckpointError as error:
        why = str(error)
    else:
        kind = (there.dtype, there.coding)
        if kind != (dtype, coding):
            why = f"it has dtype {kind[0]} and coding {kind[1]}"
        elif not set(STATE) <= set(there.columns):
            why = "it lacks the sizes and times of its files"
        elif there.mismatch:
            why = f"it was built with {there.mismatch}"
        else:
            return there
    print_status(f"all images are encoded, and the index at {folder} is replaced: {why}")
    return None


def _save(index: Any, folder: Path, replaces: bool) -> None:
    from vlm.weights.registry import source_of

    try:
        index.save(folder, overwrite=replaces)
    except ConflictError:
        raise ConflictError(
            f"another process saved to {folder} while this command ran: run it again, and it "
            "encodes what that index lacks"
        ) from None
    about = {"model": source_of(index.model.source)}
    if (frames := getattr(index.model, "frames", None)) is not None:  # of a VideoEncoder
        about["video_frames"] = frames
    partial = folder / f"{MODEL_FILE}.{os.getpid()}"
    partial.write_text(json.dumps(about) + "\n", encoding="utf-8")
    partial.replace(folder / MODEL_FILE)


def recorded_frames(folder: Path) -> int | None:
    """Return the frames of each video in an index of videos; None for one of images."""
    try:
        frames = parse((folder / MODEL_FILE).read_text(encoding="utf-8")).get("video_frames")
    except (OSError, ValueError):
        return None
    return frames if isinstance(frames, int) else None


def is_index(folder: Path) -> bool:
    """Whether `folder` holds an index."""
    return (folder / "index.json").is_file()


def model_of(folder: Path) -> str:
    """Return the model that built an index, for `vlm.load`.

    Raises:
        CheckpointError: the index lacks it, or the model has moved.
    """
    file = folder / MODEL_FILE
    try:
        model = parse(file.read_text(encoding="utf-8"))["model"]
        if not isinstance(model, str):
            raise TypeError(f"{model!r} is no name")
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"the index {folder} does not record its model: give it with --model MODEL"
        ) from None
    if os.path.isabs(model) and not os.path.exists(model):
        raise CheckpointError(
            f"the index {folder} was built by {model}, which does not exist: give its new path "
            "with --model MODEL"
        )
    return model
