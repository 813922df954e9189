"""`vlm search`: search images by a text, another image or a video."""

import contextlib
import hashlib
import json as jsonlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from vlm.cli import options, runtime
from vlm.cli.index import is_index, model_of, recorded_frames, update_index
from vlm.cli.model import load_model
from vlm.cli.parse import UsageError
from vlm.errors import CheckpointError, ConflictError, DataError
from vlm.paths import as_path, cache_dir, is_remote


def search(
    index: Annotated[str, arg(metavar="FOLDER|INDEX")],
    query: Annotated[str, arg(metavar="QUERY")],
    /,
    k: int = 5,
    model: Annotated[str | None, arg(metavar="MODEL")] = None,
    open: bool = False,
    copy: Annotated[str | None, arg(metavar="FOLDER")] = None,
    sheet: Annotated[str | None, arg(metavar="FILE")] = None,
    pictures: bool = True,
    json: bool = False,
    plus: Annotated[tuple[str, ...], arg(metavar="QUERY...")] = (),
    minus: Annotated[tuple[str, ...], arg(metavar="QUERY...")] = (),
    weight: float = 1.0,
    like: bool = False,
    where: Annotated[tuple[str, ...], arg(metavar="COLUMN=VALUE...")] = (),
    min_score: float | None = None,
    min_probability: float | None = None,
    prompt: str | None = None,
    root: options.Root = (),
) -> None:
    """Find the images that are most similar to a text, an image or a video.

    The first search of a folder encodes its images and keeps an index in the cache folder. Later
    searches encode only new and changed files. An INDEX is the output of `vlm index`, which records
    its model.

    Examples:
      vlm search photos/ "a dog in the snow"
      vlm search photos/ like-this.jpg --k 20 --sheet hits.png
      vlm search photos/ "a red car" --model ViT-L-14 --copy red-cars/
      vlm search my-index "golden retriever" --weight 2 --plus this.jpg --minus fruit
      vlm search my-index photos/dog.jpg --like --where "bytes>100000"

    Args:
        index: a folder of images, or an index.
        query: a text, or the path of an image or a video.
        k: how many images to show.
        model: for a folder of images: a run folder, a bundle, a Hub id, or a name of `vlm models`.
            Default: the variable VLM_MODEL, else EVA02-B-16. For an index: its model, if it moved.
        open: open the images with the system's viewer.
        copy: copy the images into this folder.
        sheet: draw the images on a contact sheet, a .png or .jpg file.
        pictures: show the images in terminals that can: kitty, iTerm2, and those with sixels.
        json: print one JSON object for each image.
        plus: texts, images and videos to add to the query.
        minus: texts, images and videos to subtract from the query.
        weight: weight of the main query; --plus and --minus terms have weight 1.
        like: QUERY is the id of an image in the index; find similar images.
        where: conditions on metadata, with =, !=, <, <=, > or >=; all must hold.
        min_score: the lowest cosine to show.
        min_probability: the lowest probability to show, for a model of the sigmoid loss.
        prompt: name of the model's prompt to put before text queries. Default: the model's own.
    """
    if k < 1:
        raise UsageError(f"--k {k} finds nothing: give at least 1")
    if not query.strip():
        raise UsageError("the query is empty: give a text or the path of an image or a video")
    if sheet is not None and not sheet.lower().endswith((".png", ".jpg", ".jpeg")):
        raise UsageError(f"--sheet {sheet!r} is not a PNG or JPEG: give a name that ends in .png")
    runtime.prepare_inference()
    from vlm.cli.terminal import print_status

    limits: dict[str, Any] = {}
    if conditions := [_condition(text) for text in where]:
        from vlm.heads.filters import Condition, where_all

        limits["where"] = where_all([Condition(*condition) for condition in conditions])
    terms = () if like else tuple(map(_query, (query, *plus, *minus)))  # which checks the files
    if prompt is not None and not any(isinstance(item, str) for item in terms):
        raise UsageError("--prompt is put before text queries, and there is none: leave it out")
    opened, unreadable = _open(index, model, options.moved_folders(root))
    if prompt is not None:
        opened.model = opened.model.with_prompt(prompt)
    if like:
        hits = opened.like(_id(opened, query), k, **limits)
    else:
        limits |= {"min_score": min_score, "min_probability": min_probability}
        items = [_embedded(opened, index, item) for item in terms]
        hits = opened.search(_combined(items, len(plus), weight), k, **limits)
    _print(hits, json, pictures)
    if open or copy or sheet:
        from vlm.cli import hit_files

        if sheet:
            hit_files.contact_sheet(hits, query).save(sheet)
            print_status(f"contact sheet {sheet}")
        if copy:
            new = hit_files.copy_files(hit_files.files_of(hits, "--copy"), copy)
            print_status(f"{new:,} images copied to {copy}")
        if open:
            hit_files.open_files(hit_files.files_of(hits, "--open"))
    unreadable.finish()


def _combined(items: Sequence[Any], plus: int, weight: float) -> Any:
    """Combine the query with the terms of --plus, which are `plus` of them, and of --minus."""
    first, *others = items
    if not others and weight == 1:
        return first
    from vlm.heads.query import Query

    combined = sum(map(Query, others[:plus]), start=Query(first, weight))
    return sum((-Query(item) for item in others[plus:]), start=combined)


def _embedded(index: Any, folder: str, item: str | Path) -> Any:
    """Return a term as `RetrievalIndex.search` takes it: of a video, its embedding."""
    from vlm.inputs.opening import SUFFIXES
    from vlm.inputs.videos import VIDEO_SUFFIXES

    if isinstance(item, str) or item.suffix.lower() not in VIDEO_SUFFIXES - SUFFIXES:
        return item
    return index.model.encode_video([item], frames=recorded_frames(Path(folder).expanduser()))[0]


def _id(index: Any, query: str) -> str | int:
    """Return the id of an item, which may be an integer."""
    return int(query) if query.isdecimal() and query not in index else query


def _print(hits: Any, json: bool, pictures: bool) -> None:
    from vlm.cli.inline_images import inline_image
    from vlm.display import bar

    for hit in hits:
        if json:
            print(jsonlib.dumps({"id": hit.id, "score": round(hit.score, 6)}, ensure_ascii=False))
            continue
        print(f"{hit.score:6.3f}  {bar(hit.score):<20}  {hit.id}")
        if pictures and isinstance(hit.id, str):
            with contextlib.suppress(DataError):  # an id that is not the path of an image
                if drawn := inline_image(hit.id):
                    print(drawn)


def _open(where: str, model: str | None, moved: dict[str, str]) -> tuple[Any, Any]:
    """Open the index at `where`, or that of the images there; also return the `Unreadable` ones."""
    from vlm.cli.images import Unreadable, find_images
    from vlm.cli.terminal import print_status
    from vlm.heads.retrieval import RetrievalIndex

    folder = Path(where).expanduser()
    if is_index(folder):
        opened = RetrievalIndex.load(folder, load_model(model or model_of(folder)))
        opened.relocate(moved)
        return opened, Unreadable(0)
    if moved:
        raise UsageError(f"--root is for an index, and {where!r} is none: leave it out")
    if not as_path(where).exists():
        raise CheckpointError(
            f"there is no index and no folder of images {where!r}: check the path, or build an "
            f"index with vlm index IMAGES {where}"
        )
    paths = find_images([where], absolute=True)
    bundle = load_model(model)
    cached = cached_index(where, bundle.source)
    try:
        built = update_index(cached, bundle, paths)
    except ConflictError:  # another search has encoded them meanwhile
        built = update_index(cached, bundle, paths)
    print_status(built.counts(where))
    return built.index, built.unreadable


def cached_index(images: str, model: str) -> Path:
    """Return the folder in the cache for the index of a folder of images by a model."""
    from vlm.heads import index_folder

    place = images if is_remote(images) else os.path.abspath(as_path(images))
    key = hashlib.sha256(os.fsencode(f"{place}\n{model}")).hexdigest()[:16]
    name = re.sub(r"[^\w.-]+", "_", os.path.basename(place.rstrip("/")))[:40]
    return index_folder.local_folder(cache_dir() / "indexes" / f"{name}-{key}")


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
    """Return the path of an image or a video, if `query` ends like one; else the text.

    Raises:
        DataError: the path is an image's, and there is no such file.
    """
    from vlm.inputs.opening import SUFFIXES
    from vlm.inputs.videos import VIDEO_SUFFIXES

    path = Path(query).expanduser()
    if path.suffix.lower() in VIDEO_SUFFIXES - SUFFIXES and path.is_file():
        return path
    if path.suffix.lower() not in SUFFIXES:
        return query
    if not path.is_file():
        raise DataError(f"there is no image {query!r}: check the path of the query")
    return path
