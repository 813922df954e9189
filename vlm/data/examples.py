"""Examples (dicts of features), the interface of sources, and captions of examples.

An example has the features of its data set under their original names. Images are encoded, texts
are `str` (or lists of them), and a class label is its name.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from vlm.config import DataConfig, FieldFilter
from vlm.data.class_names import NAME, class_name
from vlm.data.faults import BadSample
from vlm.errors import DataError

Example = dict[str, Any]

# Keys that no feature can have, set by sources.
WHERE = "\0where"  # location of the example
PART = "\0part"  # index of the source in a mixture
OPENED = "\0opened"  # the image is cached, in mode RGB

SCORE = "clip_score"  # feature that `data.scores` adds
AMBIGUOUS = "two captions"  # kind of a bad sample with two different captions
LOOKED_AT = 64  # examples to search for the features in a config


@runtime_checkable
class Source(Protocol):
    """Deterministic, picklable sequence of examples.

    It may have a method `scan`, which yields all examples in order without their images (those of
    tars as None), and bad ones as `BadSample`.

    It may have attributes: `files` (that it reads), `label_names` (of all classes, in order),
    `class_names` (their names in prompts), `templates` (prompts with `{}` for the name), `credits`
    (licence and authors) and `faults` (unreadable shards, found on opening).
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def scan(source: Source) -> Iterator[Example | BadSample]:
    """Yield all examples of a source in order, without images where it can leave them out."""
    if hasattr(source, "scan"):
        yield from source.scan()  # pyright: ignore[reportAttributeAccessIssue]
        return
    for index in range(len(source)):
        try:
            example: Example | BadSample = source[index]
        except BadSample as bad:
            example = bad
        yield example


def copy_metadata(wrapper: Any, source: Any) -> None:
    """Copy the metadata of a source to a wrapper of it."""
    for name in ("files", "label_names", "class_names", "templates", "credits", "faults"):
        if hasattr(source, name):
            setattr(wrapper, name, getattr(source, name))


class Subset:
    """Subset of a source, by indices."""

    def __init__(self, source: Source, rows: Sequence[int] | Int[np.ndarray, " n"]):
        self._source, self._rows = source, np.asarray(rows, np.int64)
        copy_metadata(self, source)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return self._source[int(self._rows[index])]

    def scan(self) -> Iterator[Example | BadSample]:
        """Yield all examples without their images."""
        chosen = set(self._rows.tolist())
        found = {i: example for i, example in enumerate(scan(self._source)) if i in chosen}
        return (found[i] for i in self._rows.tolist())


def captions_of(example: Example, config: DataConfig) -> list[str]:
    """List the captions of an example, or its label in each template; BadSample without any."""
    return [caption for captions in _by_feature(example, config) for caption in captions]


def templates_of(config: DataConfig) -> tuple[str, ...]:
    """Return the prompt templates for labels: those of the config, else only the name."""
    return config.templates or ("{}",)


def choose_caption(example: Example, config: DataConfig, u: float) -> str:
    """Choose a caption by the uniform number `u`.

    With `config.caption_weights`, first a feature that has captions is chosen, and then one of its
    captions; without weights, one of all captions. BadSample if there is no caption.
    """
    found = _by_feature(example, config)
    given = () if config.label else config.caption_weights
    pairs = zip(given or [0.0] * len(found), found, strict=True)
    weights = [weight if captions else 0.0 for weight, captions in pairs]
    if not sum(weights):  # no feature with a weight has captions
        captions = [caption for captions in found for caption in captions]
        return captions[int(u * len(captions))]
    u *= sum(weights)
    for weight, captions in zip(weights, found, strict=True):
        if weight and u < weight:
            return captions[int(u / weight * len(captions))]
        u -= weight
    return [c for c in found if c][-1][-1]  # rounding


def passes(example: Example, filters: Sequence[FieldFilter]) -> bool:
    """Whether an example passes all `filters`."""
    return all(_passes(example.get(f.feature), f) for f in filters)


def wanted_features(config: DataConfig) -> list[str]:
    """List the features that training reads besides the image, each once."""
    texts = [config.label] if config.label else list(config.captions)
    return list(dict.fromkeys([*texts, *_filtered_features(config), *_weights(config)]))


def _filtered_features(config: DataConfig) -> list[str]:
    """List the features of the data that filters read, without the score of `data.scores`."""
    names = [f.feature for f in config.filters]
    return [name for name in names if not (config.scores and name == SCORE)]


def _weights(config: DataConfig) -> list[str]:
    """List the feature of the data with weights, unless it is the score of `data.scores`."""
    name = config.weight_column
    return [] if name is None or (config.scores and name == SCORE) else [name]


def check_features(config: DataConfig, known: Collection[str], where: str) -> None:
    """Raise a DataError that names the first feature of `config` that `known` lacks."""
    wanted = {"data.image": [config.image]}
    wanted |= {"data.label": [config.label]} if config.label else {"data.captions": config.captions}
    wanted |= {"data.filters": _filtered_features(config)}
    wanted |= {"data.weight_column": _weights(config)}
    for field, features in wanted.items():
        for feature in features:
            if feature not in known:
                raise DataError(
                    f"{where} has no feature {feature!r} that {field} names: "
                    f"it has {', '.join(sorted(known))}"
                )
    if not config.label and not config.captions:
        raise DataError("data.captions is empty and data.label not set: name what to read")


def known_features(source: Source, config: DataConfig, where: str) -> list[str]:
    """Collect features from evenly spaced examples, until all in the config are found."""
    wanted = {config.image, *wanted_features(config)}
    examples: list[Example | BadSample] = []
    known: set[str] = set()
    count = min(len(source), 2**40)  # a repeated one is endless
    for index in np.unique(np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(int)).tolist():
        try:
            example = source[index]
            examples.append(example)
            known.update(example)
        except BadSample as fault:
            examples.append(fault)
        if known >= wanted:
            break
    return features_of(examples, where)


def features_of(examples: Sequence[Example | BadSample], where: str) -> list[str]:
    """Collect features of good examples; DataError if there are none, or a caption is ambiguous."""
    good = [example for example in examples if not isinstance(example, BadSample)]
    bad = [example for example in examples if isinstance(example, BadSample)]
    ambiguous = [fault for fault in bad if fault.kind == AMBIGUOUS]
    if ambiguous:
        raise DataError(str(ambiguous[0]))
    if not good:
        why = bad[-1] if bad else "there are none"
        raise DataError(
            f"none of the {len(bad)} examples of {where} that were looked at is good ({why})"
        )
    return list(dict.fromkeys(n for example in good for n in example if not n.startswith("\0")))


def flat_items(name: str, value: Any, full_name: str) -> Iterator[tuple[str, Any]]:
    """Flatten a value: yield the fields of objects, or of lists of objects, by their paths.

    The feature `full_name`, an image, is not flattened.
    """
    if name == full_name or not isinstance(value, dict | list):
        yield name, value
    elif isinstance(value, dict):
        for field, inner in value.items():
            yield from flat_items(f"{name}/{field}", inner, full_name)
    elif any(isinstance(item, dict) for item in value):
        items = [item for item in value if isinstance(item, dict)]
        for field in dict.fromkeys(field for item in items for field in item):
            yield from flat_items(f"{name}/{field}", [item.get(field) for item in items], full_name)
    else:
        yield name, value


def label_of(example: Example, config: DataConfig) -> str:
    """Return an example's class as text: 2, 2.0 and "2" become "2"; BadSample if it is not one."""
    where, name = example.get(WHERE, "an example"), config.label or ""
    value = example.get(name)
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, list | tuple) and value:
        why = f"{where} has {len(value)} labels in {name}: name a feature with one"
        raise BadSample("several labels", where, why)
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    if value is None or value == "" or value == []:
        raise BadSample("no label", where, f"{where} has no label in {name}")
    return str(value)


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value: itself, or those in a nested list."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str) and value.strip():
        yield value


def _by_feature(example: Example, config: DataConfig) -> list[list[str]]:
    """List the captions of each of `config.captions`; at least one in total."""
    where = example.get(WHERE, "an example")
    if config.label:
        known = NAME in example
        name = example[NAME] if known else class_name(label_of(example, config), config)
        return [[template.replace("{}", name)] for template in templates_of(config)]
    texts = [list(_texts(example.get(feature))) for feature in config.captions]
    if not any(texts):
        features = ", ".join(config.captions)
        raise BadSample(
            "no caption",
            where,
            f"{where} has no caption in {features}: remove it or name more features",
        )
    return texts


def _passes(value: Any, f: FieldFilter) -> bool:
    if f.one_of and str(value) not in f.one_of:
        return False
    if f.at_least is None and f.at_most is None:
        return True
    low = -math.inf if f.at_least is None else f.at_least
    high = math.inf if f.at_most is None else f.at_most
    try:
        return low <= float(value) <= high
    except (TypeError, ValueError):
        return False
