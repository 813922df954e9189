"""Random access to the examples of a data set: `open_source` gives a sequence of feature dicts.

An example keeps the features of its data set under their own names. Images stay encoded; text is
`str` (or a list of them), a class label is its name. What is asked of any source: `len(source)`,
`source[i]`, and to be picklable, since reader processes get their own copy.
"""

import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int32

from vlm.config import DataConfig
from vlm.data import openmoji
from vlm.errors import DataError
from vlm.inputs.preprocess import Preprocess
from vlm.paths import as_path, cache_dir

KNOWN = (
    '"openmoji"',
    '"tfds:NAME" (a prepared TFDS data set)',
    "a table of image paths and captions (.csv, .tsv, .jsonl)",
    "a folder with captions.csv, captions.tsv or captions.jsonl",
    "WebDataset shards (.tar, with * or {000..099})",
)

Example = dict[str, Any]


class Source(Protocol):
    """A sequence of examples, the same each time it is opened."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def open_source(config: DataConfig, split: str) -> Source:
    """The examples of one split of `config.source`.

    Raises:
        DataError: the source or split does not exist, or lacks a feature that the config names.
    """
    name = config.source
    if name == "openmoji":
        builder = openmoji.prepare(as_path(config.data_dir or cache_dir() / "data"))
        return TfdsSource(builder, split, config)
    if name.startswith("tfds:"):
        return TfdsSource(_prepared(name.removeprefix("tfds:"), config.data_dir), split, config)
    from vlm.data import table, webdataset  # the rarer kinds load on use

    if ".tar" in os.path.basename(name):
        return webdataset.open_shards(config, split)
    if name.endswith(table.SUFFIXES) or as_path(name).is_dir():
        return table.open_table(config, split)
    raise DataError(f"data.source {name!r} is unknown: give {'; '.join(KNOWN)}")


class TfdsSource:
    """A split of a prepared TFDS data set, read without TensorFlow."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, config: DataConfig):
        self.credits = builder.info.redistribution_info.license or ""  # as the metadata states them
        features, where = builder.info.features, f"the data set {builder.info.full_name}"
        check_features(config, list(features), where)
        self._label = config.label
        self._image = config.image  # bytes that stay bytes
        self._names = features[config.label].names if config.label else None
        try:
            decoders = {config.image: tfds.decode.SkipDecoding()}
            self._records = builder.as_data_source(split, decoders=decoders)
        except NotImplementedError as error:
            raise DataError(
                f"{where} is stored as {builder.info.file_format.value}, which has no random "
                f'access: prepare it with file_format="array_record" ({error})'
            ) from None
        except (ValueError, KeyError):
            raise DataError(
                f"{where} has no split {split!r}: it has {', '.join(sorted(builder.info.splits))}"
            ) from None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[int(index)]
        example = {k: v if k == self._image else _text(v) for k, v in record.items()}
        if self._label:
            example[self._label] = self._names[int(example[self._label])]
        return example

    @property
    def label_names(self) -> list[str] | None:
        """All class names in the order of their ids, when the config asks for a label."""
        return self._names


class CachedSource:
    """The same examples, each opened once and kept with its image decoded (mode RGB)."""

    def __init__(self, source: Source, image: str, preprocess: Preprocess):
        self._source, self._image, self._preprocess = source, image, preprocess
        self._kept: list[Example | None] = [None] * len(source)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Example:
        example = self._kept[index]
        if example is None:  # two threads may both come here: they make equal examples
            example = dict(self._source[index])
            example[self._image] = self._preprocess.open(
                example[self._image], f"the image of example {index}"
            )
            self._kept[index] = example
        return example


def captions_of(example: Example, config: DataConfig) -> list[str]:
    """Every caption of an example: of all `config.captions`, or its label in each template.

    Raises:
        DataError: there is none.
    """
    if config.label:
        return [template.format(example[config.label]) for template in config.templates]
    captions: list[str] = []
    for feature in config.captions:
        value = example[feature]
        captions.extend([value] if isinstance(value, str) else value)
    captions = [caption for caption in captions if caption]
    if not captions:
        features = ", ".join(config.captions)
        raise DataError(f"an example has no caption in {features}: remove it or name more features")
    return captions


def all_captions(config: DataConfig) -> list[str]:
    """The unique captions of all splits, in order: the candidates of zero-shot evaluation.

    An image counts with its first caption; with a label, every class counts, seen or not.
    """
    splits = [config.train_split, config.eval_split]
    sources = [open_source(config, split) for split in splits if split]
    names = getattr(sources[0], "label_names", None)
    if names:
        return [config.templates[0].format(name) for name in names]
    return list(dict.fromkeys(c for source in sources for c in first_captions(source, config)))


def held_out(config: DataConfig) -> Int32[np.ndarray, "n"]:
    """For each image of the evaluation split, the index of its caption in `all_captions`.

    Raises:
        DataError: the config names no evaluation split.
    """
    if not config.eval_split:
        raise DataError("data.eval_split is not set: name the split to evaluate on")
    index = {caption: i for i, caption in enumerate(all_captions(config))}
    source = open_source(config, config.eval_split)
    return np.array([index[caption] for caption in first_captions(source, config)], np.int32)


def vocabulary_texts(config: DataConfig) -> list[str]:
    """Every caption of the training split: what a vocabulary of the data's own is learned from."""
    source = open_source(config, config.train_split)
    return [text for i in range(len(source)) for text in captions_of(source[i], config)]


def credits(config: DataConfig) -> str:
    """The licence and authors of the data, as its metadata states them; empty if it does not."""
    return getattr(open_source(config, config.train_split), "credits", "")


def first_captions(source: Source, config: DataConfig) -> list[str]:
    """The first caption of each example, in order."""
    return [captions_of(source[i], config)[0] for i in range(len(source))]


def check_features(config: DataConfig, known: Sequence[str], where: str) -> None:
    """Raise a DataError that names the first feature of `config` that `known` lacks."""
    wanted = {"data.image": [config.image]}
    wanted |= {"data.label": [config.label]} if config.label else {"data.captions": config.captions}
    for field, features in wanted.items():
        for feature in features:
            if feature not in known:
                raise DataError(
                    f"{where} has no feature {feature!r} that {field} names: "
                    f"it has {', '.join(sorted(known))}"
                )
    if not config.label and not config.captions:
        raise DataError("data.captions is empty and data.label not set: name what to read")


def _prepared(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # TFDS has many kinds of not found, and import errors of its own
        raise DataError(f"TFDS knows no data set {name!r} ({_first_line(error)})") from None
    if not builder.info.splits:
        raise DataError(
            f"the TFDS data set {name!r} is not prepared in {builder.data_dir}: set data_dir to "
            f"where it is, or prepare it with tfds.builder({name!r}, file_format="
            '"array_record").download_and_prepare()'
        )
    return builder


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, list | np.ndarray) and len(value) and isinstance(value[0], bytes):
        return [item.decode(errors="replace") for item in value]
    return value
