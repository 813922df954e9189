"""`vlm search`: search images by a text or by another image."""

import contextlib
import json as jsonlib
import re
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from vlm.cli import runtime
from vlm.cli.index import is_index, model_of
from vlm.cli.parse import UsageError
from vlm.errors import CheckpointError, DataError


def search(
    index: Annotated[str, arg(metavar="INDEX")],
    query: Annotated[str, arg(metavar="QUERY")],
    /,
    model: Annotated[str | None, arg(metavar="MODEL")] = None,
    k: int = 5,
    plus: Annotated[tuple[str, ...], arg(metavar="QUERY...")] = (),
    minus: Annotated[tuple[str, ...], arg(metavar="QUERY...")] = (),
    weight: float = 1.0,
    like: bool = False,
    where: Annotated[tuple[str, ...], arg(metavar="COLUMN=VALUE...")] = (),
    min_score: float | None = None,
    min_probability: float | None = None,
    json: bool = False,
) -> None:
    """Find the images that are most similar to a text or to another image.

    INDEX is the output of `vlm index`, which records its model; or a folder of images, which is
    encoded for this search by the --model that you name.

    Examples:
      vlm search my-index "a red car in the snow"
      vlm search my-index like-this.jpg --k 20
      vlm search my-index "golden retriever" --weight 2 --plus this.jpg --minus fruit
      vlm search my-index photos/dog.jpg --like --where "bytes>100000"
      vlm search photos/ "a red car in the snow" --model runs/openmoji

    Args:
        index: an index, or a folder of images.
        query: a text, or the path of an image.
        model: required for a folder of images; for an index only if its model has moved.
        k: how many images to show.
        plus: texts and images to add to the query.
        minus: texts and images to subtract from the query.
        weight: weight of the main query; --plus and --minus terms have weight 1.
        like: QUERY is the id of an image in the index; find similar images.
        where: conditions on metadata, with =, !=, <, <=, > or >=; all must hold.
        min_score: the lowest cosine to show.
        min_probability: the lowest probability to show, for a model of the sigmoid loss.
        json: print one JSON object for each image.
    """
    if k < 1:
        raise UsageError(f"--k {k} finds nothing: give at least 1")
    if not query.strip():
        raise UsageError("the query is empty: give a text or the path of an image")
    runtime.prepare_inference()
    from vlm.display import bar
    from vlm.heads.filters import Condition, where_all

    conditions = [_condition(text) for text in where]
    opened, unreadable = _open(index, model)
    options: dict[str, Any] = {}
    if conditions:
        options["where"] = where_all([Condition(*condition) for condition in conditions])
    if like:
        # Ids may be integers.
        number = int(query) if query not in opened and query.isdecimal() else query
        hits = opened.like(number if number in opened else query, k, **options)
    else:
        combined = _query(query)
        if plus or minus or weight != 1:
            from vlm.heads.query import Query

            combined = sum((Query(_query(text)) for text in plus), start=Query(combined, weight))
            combined = sum((-Query(_query(text)) for text in minus), start=combined)
        options |= {"min_score": min_score, "min_probability": min_probability}
        hits = opened.search(combined, k, **options)
    for hit in hits:
        if json:
            print(jsonlib.dumps({"id": hit.id, "score": round(hit.score, 6)}, ensure_ascii=False))
        else:
            print(f"{hit.score:6.3f}  {bar(hit.score):<20}  {hit.id}")
    unreadable.finish()


def _open(where: str, model: str | None) -> tuple[Any, Any]:
    """Open the index at `where`, or encode the images there; also return the `Unreadable` ones."""
    from vlm.bundle import load
    from vlm.cli.images import Unreadable, find_images
    from vlm.cli.terminal import progress
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
            f"{where!r} is not an index: give a model to encode its images with --model MODEL, or "
            f"build an index with vlm index MODEL {where} OUT"
        )
    paths = find_images([where])
    new_index, unreadable = RetrievalIndex(load(model)), Unreadable(len(paths))
    new_index.add(progress(paths, "encoding", len(paths)), on_error=unreadable.handler(paths))
    if not len(new_index):
        unreadable.finish()
    return new_index, unreadable


def _condition(text: str) -> tuple[str, str, str | float]:
    """Parse a condition such as `COLUMN>=VALUE` to column, comparison and value.

    Raises:
        UsageError: another form.
    """
    match = re.fullmatch(r"\s*([^=<>!]+?)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*", text)
    if not match:
        raise UsageError(
            f'--where {text!r} is not a condition: write COLUMN=VALUE, such as "year>=2020"'
        )
    value: str | float = match[3]
    with contextlib.suppress(ValueError):
        value = float(value)
    return match[1], match[2], value


def _query(query: str) -> str | Path:
    """Return the path of an image, if `query` ends like one; else the text.

    Raises:
        DataError: there is no such image.
    """
    from vlm.inputs.opening import SUFFIXES

    path = Path(query).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        return query
    if not path.is_file():
        raise DataError(f"there is no image {query!r}: check the path of the query")
    return path
