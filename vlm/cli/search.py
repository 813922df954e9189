"""`vlm search`: find images by a text, or by another image."""

import contextlib
import json as jsonlib
import re
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
    """Find the images that a text, or another image, is nearest to.

    INDEX is one that `vlm index` wrote, which knows its model; or a folder of images, which is
    encoded anew each time by the --model that you name.

    Examples:
      vlm search my-index "a red car in the snow"
      vlm search my-index like-this.jpg --k 20
      vlm search my-index "golden retriever" --weight 2 --plus this.jpg --minus fruit
      vlm search my-index photos/dog.jpg --like --where "bytes>100000"
      vlm search photos/ "a red car in the snow" --model runs/openmoji

    Args:
        index: an index, or a folder of images.
        query: a text, or the path of an image.
        model: for a folder of images; for an index only if its model has moved.
        k: how many to show.
        plus: texts and images to add to the query.
        minus: texts and images to take off it.
        weight: of the query itself; those added and taken off count once.
        like: the query is the id of an image in the index; find others like it.
        where: conditions on the metadata, of =, !=, <, <=, > and >=; all must hold.
        min_score: the least cosine to show.
        min_probability: the least probability to show, for a model of the sigmoid loss.
        json: one JSON object for each image found.
    """
    if k < 1:
        raise UsageError(f"--k {k} finds nothing: ask for at least 1")
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
        # Ids may be integers, which a command line has as texts.
        number = int(query) if query not in opened and query.isdecimal() else query
        hits = opened.like(number if number in opened else query, k, **options)
    else:
        asked = _query(query)
        if plus or minus or weight != 1:
            from vlm.heads.query import Query

            asked = sum((Query(_query(text)) for text in plus), start=Query(asked, weight))
            asked = sum((-Query(_query(text)) for text in minus), start=asked)
        options |= {"min_score": min_score, "min_probability": min_probability}
        hits = opened.search(asked, k, **options)
    for hit in hits:
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


def _condition(text: str) -> tuple[str, str, str | float]:
    """The column, the comparison and the value of `COLUMN=VALUE` or the like.

    Raises:
        UsageError: it is none.
    """
    found = re.fullmatch(r"\s*([^=<>!]+?)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*", text)
    if not found:
        raise UsageError(
            f'--where {text!r} is no condition: write COLUMN=VALUE, such as "year>=2020"'
        )
    value: str | float = found[3]
    with contextlib.suppress(ValueError):
        value = float(value)
    return found[1], found[2], value


def _query(query: str) -> str | Path:
    """A text, or the image of that name: the words of a file name are never what was meant."""
    from vlm.inputs.opening import SUFFIXES

    path = Path(query).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        return query
    if not path.is_file():
        raise DataError(f"there is no image {query!r}: check the path of the query")
    return path
