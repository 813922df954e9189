"""`vlm index`: make images searchable."""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from vlm.cli import parse, runtime
from vlm.cli.parse import UsageError
from vlm.errors import CheckpointError, ConflictError
from vlm.paths import as_path, is_remote

KEPT = 16_384  # images that are encoded before they are kept: what a kill costs at most
STATE = ("bytes", "modified")  # the metadata columns that tell whether an image changed
MODEL_FILE = "model.json"  # beside the index: which MODEL built it, so that a search can load it


def main(args: list[str]) -> None:
    parse.call(index, "vlm index", args)


def index(
    model: Annotated[str, arg(metavar="MODEL")],
    images_and_out: Annotated[tuple[str, ...], arg(metavar="IMAGES... OUT")],
    /,
    dtype: Literal["float32", "float16"] = "float32",
    coding: Literal["int8", "binary"] | None = None,
    batch_size: int | None = None,
    rebuild: bool = False,
) -> None:
    """Make images searchable: write an index that `vlm search` opens, and remembers its model.

    Where an index of the same model and kind lies at OUT already, only what changed is encoded:
    new images and those of another size or date come in, those that are no longer there go. Any
    other index is replaced once the new one is whole. An image that cannot be read is named and
    left out, and the command fails at its end.

    Example:
      vlm index runs/openmoji photos/ my-index
      vlm search my-index "a red car in the snow"

    Args:
        model: a run folder, a bundle, or a public checkpoint.
        images_and_out: files, folders (searched whole) and globs; and last the folder of the index.
        dtype: of the stored embeddings; float16 halves the file and moves scores by under 1e-3.
        coding: search by codes a quarter (int8) or a thirty-second (binary) as large, which are all
            that has to fit in memory; the best candidates are then scored exactly.
        batch_size: images encoded at once; None leaves it to the model.
        rebuild: ignore an existing index at OUT and re-encode everything.
    """
    *images, out = images_and_out or ("",)
    if not images:
        raise UsageError("vlm index needs images and a folder to write: vlm index MODEL IMAGES OUT")
    from vlm.heads import index_folder

    folder = index_folder.local_folder(out)
    if folder.exists() and not is_index(folder) and (folder.is_file() or any(folder.iterdir())):
        raise UsageError(
            f"the last argument, {out!r}, is where the index goes, and something else is there "
            "already: name a new folder"
        )
    runtime.prepare_inference()
    from vlm.bundle import load
    from vlm.cli.images import Unreadable, find_images, state_of
    from vlm.cli.terminal import print_status, progress
    from vlm.heads.retrieval import RetrievalIndex

    paths, bundle = find_images(images), load(model)
    made = None if rebuild else _index_of_the_same_kind(folder, bundle, dtype, coding)
    grows, replaces = made is not None or not folder.exists(), is_index(folder) and made is None
    made = made or RetrievalIndex(bundle, dtype, coding)
    unreadable = Unreadable(len(paths))
    state = {os.fspath(path): state_of(path) for path in paths}
    columns = made.columns
    held = zip(*(columns.get(name, ()) for name in STATE), strict=True)
    known = dict(zip(made.ids, held, strict=False))
    gone = [name for name in made.ids if name not in state]
    made.remove(gone)
    fresh = [path for path in paths if known.get(os.fspath(path)) != state[os.fspath(path)]]
    shown = progress(fresh, "encoding", len(fresh))
    for start in range(0, len(fresh), KEPT):
        part = fresh[start : start + KEPT]
        of_part = [state[os.fspath(path)] for path in part]
        metadata: dict[str, Any] = dict(zip(STATE, zip(*of_part, strict=True), strict=True))
        stream = (next(shown) for _ in part)
        made.update(stream, None, batch_size, metadata, on_error=unreadable.among(part))
        if grows and len(made) and start + KEPT < len(fresh):
            _save(made, folder, model, replaces)  # a kill costs what came after
    # One that can be read no longer is not what the index holds.
    bad = {os.fspath(p) for p in fresh} - {os.fspath(p) for p in unreadable.others(fresh)}
    made.remove([name for name in bad if name in made])
    if not len(made):
        unreadable.finish()
    if fresh or gone or bad or not is_index(folder):
        _save(made, folder, model, replaces)
    print_status(
        f"{len(made):,} images in {out} ({len(fresh) - len(bad):,} encoded, {len(gone):,} "
        f"removed); search them with: vlm search {out} QUERY"
    )
    unreadable.finish()


def index_of(model: str, images: list[str]) -> tuple[Any, Any]:
    """A `RetrievalIndex` of the images at these places, and the `Unreadable` ones among them."""
    from vlm.bundle import load
    from vlm.cli.images import Unreadable, find_images
    from vlm.cli.terminal import progress
    from vlm.heads.retrieval import RetrievalIndex

    paths = find_images(images)
    made = RetrievalIndex(load(model))
    unreadable = Unreadable(len(paths))
    made.add(progress(paths, "encoding", len(paths)), on_error=unreadable.among(paths))
    if not len(made):
        unreadable.finish()
    return made, unreadable


def _index_of_the_same_kind(folder: Path, bundle: Any, dtype: str, coding: str | None) -> Any:
    """The index at `folder`, if new embeddings may go into it; else the reason is printed."""
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
            why = "it does not say how its files were"
        elif there.mismatch:
            why = f"it was built with {there.mismatch}"
        else:
            return there
    print_status(f"all images are encoded, and the index at {folder} is replaced: {why}")
    return None


def _save(made: Any, folder: Path, model: str, replaces: bool) -> None:
    try:
        made.save(folder, overwrite=replaces)
    except ConflictError:
        raise ConflictError(
            f"another process saved to {folder} while this command ran: run it again, and it "
            "encodes what that index lacks"
        ) from None
    loadable = os.path.abspath(as_path(model)) if as_path(model).exists() else model
    about = {"model": model if is_remote(model) else loadable}
    partial = folder / f"{MODEL_FILE}.{os.getpid()}"
    partial.write_text(json.dumps(about) + "\n", encoding="utf-8")
    partial.replace(folder / MODEL_FILE)


def is_index(folder: Path) -> bool:
    """Whether an index lies in `folder`."""
    return (folder / "index.json").is_file()


def model_of(folder: Path) -> str:
    """The model that built an index, as `vlm.load` takes it.

    Raises:
        CheckpointError: the index does not say, or that model has moved.
    """
    file = folder / MODEL_FILE
    try:
        model = json.loads(file.read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"the index {folder} does not say which model built it: name it with --model MODEL"
        ) from None
    if os.path.isabs(model) and not os.path.exists(model):
        raise CheckpointError(
            f"the index {folder} was built by {model}, which is no longer there: name the place it "
            "has moved to with --model MODEL"
        )
    return model
