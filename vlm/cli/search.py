"""`vlm search`: find images by a text, or by another image."""

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from vlm.cli import parse, runtime
from vlm.cli.index import index_of, is_index, model_of
from vlm.cli.parse import UsageError
from vlm.errors import CheckpointError, DataError


def main(args: list[str]) -> None:
    parse.call(search, "vlm search", args)


def search(
    where: Annotated[str, arg(metavar="WHERE")],
    query: Annotated[str, arg(metavar="QUERY")],
    /,
    model: Annotated[str | None, arg(metavar="MODEL")] = None,
    k: int = 5,
    json: bool = False,
) -> None:
    """Find the images that a text, or another image, is nearest to.

    WHERE is an index that `vlm index` wrote, which knows its model; or a folder of images, which is
    encoded anew each time by the --model that you name.

    Examples:
      vlm search my-index "a red car in the snow"
      vlm search my-index like-this.jpg --k 20
      vlm search photos/ "a red car in the snow" --model runs/openmoji

    Args:
        where: an index, or a folder of images.
        query: a text, or the path of an image.
        model: for a folder of images; for an index only if its model has moved.
        k: how many to show.
        json: one JSON object for each image found.
    """
    if k < 1:
        raise UsageError(f"--k {k} finds nothing: ask for at least 1")
    if not query.strip():
        raise UsageError("the query is empty: give a text or the path of an image")
    runtime.prepare_inference()
    from vlm.cli.terminal import bar

    index, unreadable = _open(where, model)
    for hit in index.search(_query(query), k):
        if json:
            print(jsonlib.dumps({"id": hit.id, "score": round(hit.score, 6)}, ensure_ascii=False))
        else:
            print(f"{hit.score:6.3f}  {bar(hit.score):<20}  {hit.id}")
    unreadable.finish()


def _open(where: str, model: str | None) -> tuple[Any, Any]:
    """The index at `where`, or one made now of the images there and the `Unreadable` among them."""
    from vlm.bundle import load
    from vlm.cli.images import Unreadable
    from vlm.heads.retrieval import RetrievalIndex

    folder = Path(where).expanduser()
    if is_index(folder):
        return RetrievalIndex.load(folder, load(model or model_of(folder))), Unreadable(0)
    if not folder.exists():
        raise CheckpointError(
            f"there is no index and no folder of images {where!r}: check the path, or build an "
            f"index with vlm index MODEL IMAGES {where}"
        )
    if model is None:
        raise UsageError(
            f"{where!r} is no index: name the model that shall encode its images with --model "
            f"MODEL, or build an index once with vlm index MODEL {where} OUT"
        )
    return index_of(model, [where])


def _query(query: str) -> str | Path:
    """A text, or the image of that name: the words of a file name are never what was meant."""
    from vlm.inputs.opening import SUFFIXES

    path = Path(query).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        return query
    if not path.is_file():
        raise DataError(f"there is no image {query!r}: check the path of the query")
    return path
