"""`vlm index`: make images searchable."""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from vlm.cli import parse, runtime
from vlm.cli.parse import UsageError
from vlm.errors import CheckpointError
from vlm.paths import as_path, is_remote

MODEL_FILE = "model.json"  # beside the index: which MODEL built it, so that a search can load it


def main(args: list[str]) -> None:
    parse.call(index, "vlm index", args)


def index(
    model: Annotated[str, arg(metavar="MODEL")],
    images_and_out: Annotated[tuple[str, ...], arg(metavar="IMAGES... OUT")],
    /,
    dtype: Literal["float32", "float16"] = "float32",
    batch_size: int | None = None,
) -> None:
    """Make images searchable: write an index that `vlm search` opens, and remembers its model.

    An index that lies at OUT already is replaced once the new one is whole. An image that cannot be
    read is named and left out, and the command fails at its end.

    Example:
      vlm index runs/openmoji photos/ my-index
      vlm search my-index "a red car in the snow"

    Args:
        model: a run folder, a bundle, or a public checkpoint.
        images_and_out: files, folders (searched whole) and globs; and last the folder of the index.
        dtype: of the stored embeddings; float16 halves the file and moves scores by under 1e-3.
        batch_size: images encoded at once; None leaves it to the model.
    """
    *images, out = images_and_out or ("",)
    if not images:
        raise UsageError("vlm index needs images and a folder to write: vlm index MODEL IMAGES OUT")
    folder = Path(out)
    if folder.exists() and not is_index(folder) and (folder.is_file() or any(folder.iterdir())):
        raise UsageError(
            f"the last argument, {out!r}, is where the index goes, and something else is there "
            "already: name a new folder"
        )
    runtime.prepare_inference()
    from vlm.cli.terminal import print_status

    made, unreadable = index_of(model, images, dtype, batch_size)
    made.save(folder)
    loadable = os.path.abspath(as_path(model)) if as_path(model).exists() else model
    about = {"model": model if is_remote(model) else loadable}
    (folder / MODEL_FILE).write_text(json.dumps(about) + "\n", encoding="utf-8")
    print_status(f"{len(made):,} images in {out}; search them with: vlm search {out} QUERY")
    unreadable.finish()


def index_of(
    model: str,
    images: list[str],
    dtype: Literal["float32", "float16"] = "float32",
    batch_size: int | None = None,
) -> tuple[Any, Any]:
    """A `RetrievalIndex` of the images at these places, and the `Unreadable` ones among them."""
    from vlm.bundle import load
    from vlm.cli.images import Unreadable, find_images
    from vlm.cli.terminal import progress
    from vlm.heads.retrieval import RetrievalIndex

    paths = find_images(images)
    made = RetrievalIndex(load(model), dtype)
    unreadable = Unreadable(len(paths))
    shown = progress(paths, "encoding", len(paths))
    made.add(shown, batch_size=batch_size, on_error=unreadable.among(paths))
    if not len(made):
        unreadable.finish()
    return made, unreadable


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
