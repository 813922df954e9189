"""Passes over all examples of a source without their images: filters, labels and captions.

The results are kept in the cache folder, so that of all processes of a machine and all later runs
only one makes the pass. The key is the path, length and modification time (in nanoseconds) of each
file. A remote file has no time that can be trusted, so a pass over remote data is not kept.
"""

import io
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from vlm.config import DataConfig
from vlm.data.examples import WHERE, Example, Source, Subset, label_of, passes, scan
from vlm.data.faults import BadSample
from vlm.data.scores import digest_of, scored
from vlm.data.storage import cache_path, write_whole
from vlm.errors import DataError
from vlm.paths import is_remote

T = TypeVar("T")


def filtered(source: Source, config: DataConfig) -> Subset:
    """Select the examples of the training split that pass `config.filters`.

    Bad samples pass, so that training still counts and lists them.
    """
    passing = _cached(
        source,
        ("filters", *_subset_key(config)),
        config,
        lambda: [
            index
            for index, example in enumerate(scan(source))
            if isinstance(example, BadSample)
            or passes(_with_score(example, config), config.filters)
        ],
    )
    if not len(passing):
        raise DataError(
            f"data.filters rejects all {len(source):,} examples of {config.source}: loosen it"
        )
    return Subset(source, passing)


def _subset_key(config: DataConfig) -> tuple[Any, ...]:
    """Fields that choose the examples of the training split, and the scores that are joined."""
    scores = () if config.scores is None else ("scores", digest_of(config.scores))
    return config.filters, config.captions, config.hold_out, config.eval_split, *scores


def _with_score(example: Example, config: DataConfig) -> Example:
    """Add the score of `config.scores` to an example; DataError if the table does not list it."""
    try:
        return scored(example, config)
    except BadSample as missing:
        raise DataError(str(missing)) from None


def unique_labels(source: Source, config: DataConfig, split: str) -> set[str]:
    """Collect the labels of a split, without those of bad samples."""
    labels = _cached(
        source,
        ("labels", config.hold_out, split),
        config,
        lambda: sorted(set(valid_values(source, config, label_of))),
    )
    return set(labels.tolist())


def column_values(source: Source, config: DataConfig, column: str) -> np.ndarray:
    """Collect the weights in a column of the training split as float64.

    A bad sample has the mean weight, so that training still counts and lists it.

    Raises:
        DataError: a weight that is missing, negative or not finite, or all of them are 0.
    """
    weights = _cached(
        source,
        ("weights", column, *_subset_key(config)),
        config,
        lambda: [_weight(*item, config, column) for item in enumerate(scan(source))],
    )
    known = weights[weights >= 0]
    if not known.any():
        raise DataError(
            f"the column {column!r} of {config.source}, which data.weight_column names, has no "
            f"weight above 0 in {len(weights):,} examples: name another column"
        )
    return np.where(weights >= 0, weights, known.mean())


def _weight(index: int, example: Example | BadSample, config: DataConfig, column: str) -> float:
    """Return the weight of an example; -1 of a bad sample."""
    if isinstance(example, BadSample):
        return -1.0
    example = _with_score(example, config)
    value, where = example.get(column), example.get(WHERE, f"example {index}")
    try:
        weight = float("nan") if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError):
        weight = float("nan")
    if not 0 <= weight < float("inf"):
        has = "no value" if value is None else repr(value)
        raise DataError(
            f"{where} has {has} in the column {column!r}, which data.weight_column names: give a "
            "number of at least 0, or leave the example out with data.filters"
        )
    return weight


def valid_values(
    source: Source, config: DataConfig, value_of: Callable[[Example, DataConfig], T]
) -> Iterator[T]:
    """Yield `value_of(example, config)`, skipping bad samples."""
    for example in scan(source):
        try:
            if not isinstance(example, BadSample):
                yield value_of(example, config)
        except BadSample:
            continue


def good_examples(source: Source) -> Iterator[Example]:
    """Yield all examples without their images; BadSample at the first bad one."""
    for example in scan(source):
        if isinstance(example, BadSample):
            raise example
        yield example


def _cached(
    source: Source, key: tuple[Any, ...], config: DataConfig, make: Callable[[], list]
) -> np.ndarray:
    """Return `make()` as an array, from the cache if the files of `source` are unchanged."""
    files = getattr(source, "files", None)
    if not files or any(map(is_remote, files)):
        return np.array(make())
    from huggingface_hub.utils import WeakFileLock

    key = (*key, config.source, config.train_split, config.image, config.label, len(source))
    path = cache_path(files, ".npy", repr(key))
    with WeakFileLock(f"{path}.lock"):  # other processes wait for the first one
        try:
            return np.load(path)
        except (OSError, ValueError, EOFError):
            pass  # missing or corrupt
        out = io.BytesIO()
        np.save(out, found := np.array(make()))
        write_whole(path, out.getvalue())
    return found
