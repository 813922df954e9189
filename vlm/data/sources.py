"""Opening of data sources by `data.source`, and their splits, captions and classes."""

import dataclasses
import importlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from vlm.config import DataConfig, SourceCode
from vlm.config.placeholders import PLACEHOLDER
from vlm.data import mixture, python_source, python_stream, table
from vlm.data.class_names import NAME, names_of, read_class_names
from vlm.data.clip_benchmark import is_clip_benchmark
from vlm.data.examples import (
    OPENED,
    Example,
    Source,
    captions_of,
    copy_metadata,
    label_of,
    scan,
    templates_of,
)
from vlm.data.faults import BadSample
from vlm.data.hold_out import part_of
from vlm.data.hub_access import SCHEME, need_files
from vlm.data.interleave import MAX_DEFAULT_LANES, Stream, count_lanes
from vlm.data.known_classes import imagenet_names, imagenet_templates
from vlm.data.layouts import find_layout, has_split_names
from vlm.data.parquet import holds_images, stream_label_names
from vlm.data.random_access import IndexedStream
from vlm.data.randomness import key
from vlm.data.scans import filtered, good_examples, unique_labels, valid_values
from vlm.data.shard_stream import find_shards, plan_stream
from vlm.data.splits import WHOLE, default_split, find_split, named_splits
from vlm.data.transform_example import open_image_of
from vlm.data.weighted_order import order_of, refuse_weights
from vlm.errors import ConfigError, DataError
from vlm.inputs.preprocess import Preprocess
from vlm.paths import as_path, is_remote

KNOWN = (
    '"openmoji"',
    '"tfds:NAME" (a prepared TFDS data set, its folder, or the class of its builder)',
    "hf://datasets/OWNER/NAME (a data set on the Hugging Face Hub)",
    "wds:FOLDER (shards, class names and templates in the layout of CLIP_benchmark)",
    "WebDataset shards (.tar, with *, {000..099} or {a,b})",
    "a table of images and captions (.csv, .tsv, .jsonl, .json, also .gz, or .parquet)",
    "ArrayRecord or TFRecord files (.array_record, .tfrecord)",
    "Arrow files (.arrow), or a folder that Hugging Face datasets saved",
    "a folder with captions.csv, .tsv or .jsonl, a text beside each image, or class folders",
    "a data set in Python: an object, or its import path as python:MODULE:NAME",
)


def open_source(config: DataConfig, split: str) -> Source:
    """Open a split of `config.source` with random access.

    Raises:
        DataError: the source or split does not exist, or lacks a feature that the config names.

    Example:
        >>> source = vlm.data.open_source(experiment.data, "train")
        >>> len(source)
        12
    """
    if split != config.train_split and config.weight_column:  # weights are of training only
        config = dataclasses.replace(config, weight_column=None)
    source = _open(config, split)
    labels = getattr(source, "label_names", None) or ()
    named = config.class_names or getattr(source, "class_names", None) or imagenet_names(labels)
    if config.label and named:
        classes = classes_of(config, source)
        source = NamedSource(source, config, dict(zip(*classes, strict=True)))
    if config.filters and split == config.train_split:
        return filtered(source, config)
    return source


def split_names(config: DataConfig) -> list[str] | None:
    """List the splits of `config.source`; None if it has no splits."""
    known = _own_splits(config)
    if config.hold_out and config.eval_split:
        return [*(known or [config.train_split]), config.eval_split]
    return known


def _own_splits(config: DataConfig) -> list[str] | None:
    """List the splits of a source, without the one that is held out."""
    name, kind = config.source, kind_of(config.source)
    if kind and has_split_names(name):
        return named_splits(name)
    if kind and hasattr(_reader(kind), "list_splits"):
        return _reader(kind).list_splits(config)
    return None


def open_to_measure(config: DataConfig, split: str | None) -> tuple[Source, str]:
    """Open a split for evaluation; return it and its name.

    Without `split`, `default_split` chooses one. A source without splits is used whole, as `WHOLE`.
    DataError if there is no such split, or no default.
    """
    known = split_names(config)
    if known is None and split in (None, WHOLE):
        return open_source(dataclasses.replace(config, filters=()), config.train_split), WHOLE
    if split is None:
        split = default_split(known or (), config.source)
    elif known and not re.search(r"[+\[]", split):  # not a TFDS expression
        split = find_split(split, known, config.source)
    # Filters apply to training only.
    config = dataclasses.replace(config, eval_split=split, filters=())
    return open_source(config, split), split


def _open(config: DataConfig, split: str) -> Source:
    name = config.source
    if not (kind := kind_of(name)):
        raise DataError(f"data.source {name!r} is unknown: give {'; '.join(KNOWN)}")
    if not config.hold_out or split not in (config.train_split, config.eval_split):
        return _reader(kind).open_split(config, split)
    known = _own_splits(config) or ()
    if config.eval_split in known:
        raise DataError(
            f"{name} has a split {config.eval_split!r} of its own ({', '.join(known)}): set "
            "data.hold_out to 0"
        )
    whole = _reader(kind).open_split(config, config.train_split)
    return part_of(whole, config, held=split != config.train_split)


def _reader(kind: str) -> Any:
    """Import the module of a kind of source.

    Its function `open_split` opens a split. If splits can be listed other than by `{split}` in file
    names, its function `list_splits` does that.
    """
    return importlib.import_module(f"vlm.data.{_READERS.get(kind, kind)}")


def with_own_splits(config: DataConfig) -> DataConfig:
    """Remove the default eval split, with a warning, if `config.source` is a single data set.

    An eval split that the config names stays, and is an error when it is opened.
    """
    if not python_source.is_named(config):
        return config
    known = python_source.list_splits(config)
    if config.changed("eval_split", "hold_out") or (known is not None and len(known) != 1):
        return config
    logging.getLogger(__name__).warning(
        "%s has no eval split, so there is no held-out evaluation: give a mapping such as "
        '{"train": ..., "test": ...}, or set data.hold_out',
        config.source,
    )
    return dataclasses.replace(config, eval_split=None)


def require_source(config: DataConfig) -> None:
    """Raise a ConfigError if a config names no data, or a placeholder."""
    if not config.source and not config.mixture:
        raise ConfigError(f"no data is named: set data.source to {'; '.join(KNOWN)}")
    if PLACEHOLDER in config.source:
        raise ConfigError(
            f"BUCKET in data.source {config.source!r} stands for a bucket of yours: write its name "
            "there, as vlm train --bucket does"
        )


def kind_of(name: str) -> str | None:
    """Return the kind of a source, by its name; None if unknown."""
    require_source(DataConfig(name))
    if name == "openmoji":
        return name
    if name.startswith(SourceCode.PREFIX):
        return "python"
    if name.startswith("tfds:"):
        return "tfds"
    if is_clip_benchmark(name):
        return "clip_benchmark"
    last = os.path.basename(name.split("::")[0])
    if ".tar" in last:
        return "tar"
    for ending, kind in _ENDINGS.items():
        if ending in last:
            return kind
    if name.lower().endswith(table.SUFFIXES):
        return "table"
    if (layout := find_layout(name)) is not None:
        return layout.kind
    if name.startswith(SCHEME):
        need_files(name)
    folder = as_path(name)
    if not folder.is_dir():
        return None
    if any((folder / f"captions{suffix}").exists() for suffix in table.SUFFIXES):
        return "table"
    if any((folder / file).exists() for file in ("state.json", "dataset_dict.json")):
        return "arrow"
    if all((folder / file).exists() for file in ("dataset_info.json", "features.json")):
        return "tfds"
    return "folder"


_ENDINGS = {
    ".array_record": "array_record",
    ".tfrecord": "tfrecord",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
# Kinds of source whose module has a different name than the kind.
_READERS = {
    "tfds": "prepared",
    "openmoji": "prepared",
    "tar": "shard_index",
    "python": "python_source",
}


def streams(config: DataConfig) -> bool:
    """Whether training reads a stream: a mixture, streamed shards, or data with its own order.

    ConfigError if `data.access` is "stream" for a source that cannot be streamed.
    """
    if config.mixture:
        return True
    kind = kind_of(config.source)
    in_order = kind == "python" and python_source.is_read_in_order(config)
    if config.access == "stream" and kind not in ("tar", "parquet") and not in_order:
        raise ConfigError(
            f"{config.source} cannot be read as a stream, which needs .tar or .parquet shards, or "
            'a grain data set: set data.access="auto"'
        )
    if in_order:
        return True
    if config.access != "auto":
        return config.access == "stream"
    if kind == "parquet":
        return is_remote(config.source) or holds_images(config)
    return kind == "tar" and is_remote(config.source)


def is_iterable(config: DataConfig, split: str) -> bool:
    """Whether a split is an iterable in Python, which has no random access."""
    if not python_source.is_named(config):
        return False
    return python_source.is_iterable(python_source.find_data(config, split))


def has_shards(config: DataConfig) -> bool:
    """Whether training reads shards as a stream."""
    return streams(config) and not config.mixture and not python_source.is_named(config)


def open_stream(
    config: DataConfig, global_batch: int, *, seed: int, process_index: int, process_count: int
) -> Stream:
    """Open the training samples of `config` as a stream, after inspecting the first of them.

    DataError if there are too few shards, or they lack wanted features.
    """
    if not config.mixture:
        refuse_weights(config)
    if python_source.is_named(config):
        return python_stream.open_stream(
            config,
            global_batch,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
        )
    configs = mixture.part_configs(config) if config.mixture else [config]
    plans = [
        plan_stream(part, find_shards(part), global_batch) if has_shards(part) else None
        for part in configs
    ]
    known = [plan for plan in plans if plan]
    fewest = min((plan.units for plan in known), default=2**31)
    most = min((plan.most for plan in known), default=MAX_DEFAULT_LANES)
    count = count_lanes(config, global_batch, fewest, process_count, most)
    if not config.mixture:
        return known[0].open(count, seed, process_count)
    parts: list[Stream] = []
    for number, (part, plan) in enumerate(zip(configs, plans, strict=True)):
        part_seed = key(seed, 5, number)
        if plan:
            refuse_weights(part)
            parts.append(plan.open(count, part_seed, process_count))
        elif streams(part):
            refuse_weights(part)
            parts.append(python_stream.open_stream(part, global_batch, seed=part_seed, lanes=count))
        else:
            source = open_source(part, part.train_split)
            parts.append(IndexedStream(source, count, part_seed, order=order_of(source, part)))
    return mixture.Mixture(config, parts, lanes=count, seed=seed)


class NamedSource:
    """Source wrapper that adds the class name to each example."""

    def __init__(self, source: Source, config: DataConfig, names: dict[str, str]):
        self._source, self._config, self._names = source, config, names
        copy_metadata(self, source)
        self.label_names, self.class_names = list(names), list(names.values())
        self.templates = getattr(source, "templates", None) or imagenet_templates(self.label_names)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        return self._named(self._source[index])

    def scan(self) -> Iterator[Example | BadSample]:
        """Yield all examples without their images."""
        for example in scan(self._source):
            try:
                yield example if isinstance(example, BadSample) else self._named(example)
            except BadSample as bad:
                yield bad

    def _named(self, example: Example) -> Example:
        name = self._names.get(label_of(example, self._config))
        return example if name is None else {**example, NAME: name}


class CachedSource:
    """Source wrapper that caches examples with decoded images (mode RGB)."""

    def __init__(self, source: Source, config: DataConfig, preprocess: Preprocess):
        self._source, self._config, self._preprocess = source, config, preprocess
        self._cache: list[Example | None] = [None] * len(source)

    def __len__(self) -> int:
        return len(self._cache)

    def __getitem__(self, index: int) -> Example:
        example = self._cache[index]
        if example is None:  # may run in two threads, with equal results
            example = dict(self._source[index])
            example[self._config.image] = open_image_of(
                example, self._config, self._preprocess, f"example {index}"
            )
            example[OPENED] = True
            self._cache[index] = example
        return example


def all_captions(config: DataConfig) -> list[str]:
    """List the unique captions of all splits, in order: the candidates of zero-shot evaluation.

    Only first captions are used. With a label, these are the captions of all classes.

    Example:
        >>> vlm.data.all_captions(experiment.data)[:2]
        ['a red square', 'a red stripe']
    """
    if config.label:
        template = templates_of(config)[0]
        return [template.replace("{}", name) for name in classes_of(config).names]
    first_texts = (
        texts[0]
        for source in _all_splits(config)
        for texts in valid_values(source, config, captions_of)
    )
    return list(dict.fromkeys(first_texts))


class Classes(NamedTuple):
    """Labels and names of the classes of a data set, in the same order."""

    labels: list[str]
    names: list[str]


def classes_of(config: DataConfig, source: Source | None = None) -> Classes:
    """Return the classes of `config.label` in all splits: as listed by the data set, or sorted.

    Args:
        config: config with the label and `class_names`.
        source: an open split, which may list the classes.

    Examples that cannot be read are ignored here; training counts and lists them. DataError if a
    stream has no classes and no split to read them from, or names do not fit.
    """
    if source is None:
        source = next(_all_splits(config), None)
    if source is not None:
        labels = list(getattr(source, "label_names", None) or _labels_of_all_splits(config))
    elif not (labels := _stream_label_names(config)):
        raise DataError(
            f"{config.source} is read as a stream, whose classes are unknown: set data.eval_split "
            "to a split that has them all"
        )
    if config.class_names is not None:
        given = read_class_names(config.class_names, labels, config.source)
    else:
        given = dict(zip(labels, getattr(source, "class_names", None) or (), strict=False))
    return Classes(labels, names_of(labels, given, config.source))


def _labels_of_all_splits(config: DataConfig) -> list[str]:
    """Collect the unique labels of all splits, sorted by value if numeric, else alphabetically."""
    if is_remote(config.source) and config.eval_split:  # other splits may be too large to read
        known = [config.eval_split]
    elif (known := split_names(config)) is None:
        known = [config.train_split]
    elif not known:  # a function, whose splits cannot be listed
        known = [split for split in (config.train_split, config.eval_split) if split]
    labels: set[str] = set()
    for name in known:
        own = dataclasses.replace(config, eval_split=name)
        labels |= unique_labels(_open(own, name), config, name)
    if all(re.fullmatch(r"-?\d+", label) for label in labels):
        return sorted(labels, key=int)
    return sorted(labels)


def _stream_label_names(config: DataConfig) -> list[str] | None:
    if python_source.is_named(config):
        return python_source.label_names(config)
    if config.mixture or kind_of(config.source) != "parquet":
        return None
    return stream_label_names(config)


def _all_splits(config: DataConfig) -> Iterator[Source]:
    for split in (None if streams(config) else config.train_split, config.eval_split):
        if split:
            yield open_source(config, split)


def held_out(config: DataConfig) -> Int32[np.ndarray, " n"]:
    """Return the index in `all_captions` of the caption of each evaluation image."""
    if not config.eval_split:
        raise DataError("data.eval_split is not set: name the split to evaluate on")
    index = {caption: i for i, caption in enumerate(all_captions(config))}
    source = open_source(config, config.eval_split)
    return np.array([index[caption] for caption in first_captions(source, config)], np.int32)


def targets_of(
    source: Source, config: DataConfig, labels: Sequence[str]
) -> Int32[np.ndarray, " n"]:
    """Return the index of each example's label in `labels`; DataError if one is not there."""
    index = {label: i for i, label in enumerate(labels)}
    examples = enumerate(good_examples(source))
    targets = [target_of(example, config, index, i) for i, example in examples]
    return np.array(targets, np.int32)


def target_of(example: Example, config: DataConfig, index: Mapping[str, int], i: int) -> int:
    """Return the class index of example `i`; DataError if its label is not in `index`."""
    label = label_of(example, config)
    if label not in index:
        raise DataError(
            f"example {i} of {config.source} {config.eval_split} has the {config.label} {label!r}, "
            "which is not a class of the data set: correct it, or remove the example"
        )
    return index[label]


def vocabulary_texts(config: DataConfig) -> list[str]:
    """List all captions of the training split, for a vocabulary; ConfigError for a stream.

    A finite grain `MapDataset` is read in its own order, and can still be read in advance.
    """
    if streams(config) and not python_source.has_length(config):
        raise ConfigError(
            "a stream cannot be read in advance to train a vocabulary: set tokenizer_file, which "
            "`vlm data tokenizer` writes"
        )
    source = open_source(config, config.train_split)
    return [text for texts in valid_values(source, config, captions_of) for text in texts]


def credits(config: DataConfig) -> str:
    """Return the licence and authors in the data's metadata; empty if missing."""
    if streams(config):
        return ""
    return getattr(open_source(config, config.train_split), "credits", "")


def first_captions(source: Source, config: DataConfig) -> list[str]:
    """List the first caption of each example, in order.

    Example:
        >>> source = vlm.data.open_source(experiment.data, "test")
        >>> vlm.data.first_captions(source, experiment.data)[0]
        'a red square'
    """
    return [captions_of(example, config)[0] for example in good_examples(source)]
