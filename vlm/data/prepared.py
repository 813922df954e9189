"""Prepared TFDS data sets, by name, folder or builder, read without TensorFlow.

A nested feature is named by its path: COCO's captions are `captions/text`.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants, read_only_builder

from vlm.config import DataConfig, SourceCode
from vlm.data import array_record, openmoji
from vlm.data.examples import WHERE, Example, check_features, flat_items
from vlm.data.faults import BadSample
from vlm.data.known_classes import classes_of_tfds
from vlm.data.openmoji import undecoded
from vlm.data.splits import find_split
from vlm.data.tfrecord import Records
from vlm.errors import DataError, first_line
from vlm.paths import as_path, cache_dir

_BUILDER_CLASS = re.compile(r"(\w+(?:\.\w+)*)[.:]([A-Z]\w*)")


def open_split(config: DataConfig, split: str) -> "TfdsSource":
    """Open a split of `tfds:NAME` or of OpenMoji; DataError if it or a feature is missing."""
    return TfdsSource(_prepared(config), split, config)


def list_splits(config: DataConfig) -> list[str]:
    """List the splits of `tfds:NAME`, or of OpenMoji."""
    return sorted(_prepared(config).info.splits)


class TfdsSource:
    """Source over a split of a prepared TFDS data set, read without TensorFlow.

    Class names and templates are those of `known_classes`.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, config: DataConfig):
        if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
            array_record.check_installed()
        self.credits = builder.info.redistribution_info.license or ""  # as the metadata states them
        features = dict(flat_features(builder.info.features))
        where = f"the data set {builder.info.full_name}"
        check_features(config, list(features), where)
        self._label = config.label
        self._image = config.image  # not decoded
        self._where = f"{where} {split}"
        self._names = None
        if config.label:
            feature = features[config.label]
            if not isinstance(feature, tfds.features.ClassLabel):
                raise DataError(
                    f"the feature {config.label!r} of {where} that data.label names is not a class "
                    f"label but a {type(feature).__name__}: name one that is"
                )
            self._names = feature.names
        self.label_names, self.class_names, self.templates = self._names, None, None
        if known := classes_of_tfds(builder.info.name, self._names or ()):
            self.label_names = list(known.wordnet_ids) or self._names
            self.class_names, self.templates = list(known.names) or None, known.templates
        for name in () if config.label else config.captions:
            if features[name].np_dtype not in (np.object_, np.str_):
                raise DataError(
                    f"the feature {name!r} of {where} that data.captions names has no text but "
                    f"{np.dtype(features[name].np_dtype)}: name one that has"
                )
        try:
            self._records = _records(builder, _resolve_split(split, builder, where), config.image)
        except (ValueError, KeyError) as error:
            raise DataError(f"{where} has no split {split!r} ({first_line(error)})") from None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        example: Example = {WHERE: f"example {index} of {self._where}"}
        for feature, record in self._records[int(index)].items():
            for name, value in flat_items(feature, record, self._image):
                example[name] = value if name == self._image else _text(value)
        if self._label and self._names:
            label = int(example[self._label])
            if label < 0:  # unlabelled in TFDS
                why = f"example {index} of {self._where} has the label {label}, which is none: name"
                raise BadSample("no label", self._where, f"{why} a split that has labels")
            example[self._label] = self._names[label]
        return example


class _Decoded:
    """Examples of the TFRecord files of a split; the feature `image` stays a file."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, image: str):
        parts = builder.info.splits[split].file_instructions
        self._records = Records([part.filename for part in parts])
        self._features: Any = builder.info.features
        self._decoders = {image: tfds.decode.SkipDecoding()}
        rows = []
        for number, part in enumerate(parts):
            count = self._records.count(number)
            end = part.skip + part.take if part.take >= 0 else part.examples_in_shard
            if end > count:
                raise DataError(
                    f"{part.filename} has {count:,} of its {part.examples_in_shard:,} records: "
                    "prepare the data set again"
                )
            first = sum(map(self._records.count, range(number)))
            rows.append(np.arange(first + part.skip, first + end))
        self._rows = np.concatenate(rows) if rows else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        record = self._records[int(self._rows[index])]
        return self._features.deserialize_example_np(record, decoders=self._decoders)


def _records(builder: tfds.core.DatasetBuilder, split: str, image: str) -> Any:
    """Open the records of a split with random access; DataError for a format without it."""
    if isinstance(builder, tfds.ImageFolder):
        raise DataError(
            f"tfds.ImageFolder reads {builder.data_dir} with TensorFlow: give this folder as "
            'data.source, with data.label="label"'
        )
    try:
        return undecoded(builder, split, image)
    except NotImplementedError:
        form = builder.info.file_format
        if form == tfds.core.FileFormat.TFRECORD:
            return _Decoded(builder, split, image)
        raise DataError(
            f"the data set {builder.info.full_name} is stored as "
            f"{form.value if form else 'files of its own'}, which has no random access: prepare it "
            'with file_format="array_record"'
        ) from None


def _resolve_split(split: str, builder: tfds.core.DatasetBuilder, where: str) -> str:
    """Resolve the names in a TFDS split expression, such as train[:3]+val."""
    parts = []
    for part in split.split("+"):
        name, bracket, rest = part.strip().partition("[")
        name = name if name == "all" else find_split(name, list(builder.info.splits), where)
        parts.append(f"{name}{bracket}{rest}")
    return "+".join(parts)


def _prepared(config: DataConfig) -> tfds.core.DatasetBuilder:
    """Open the builder of a prepared data set, if possible from its files only."""
    if config.source == "openmoji":
        return openmoji.prepare(as_path(config.data_dir or cache_dir() / "data"))
    name, data_dir = config.source.removeprefix("tfds:"), config.data_dir
    folder = as_path(name)
    if (folder / "dataset_info.json").exists():
        return tfds.builder_from_directory(folder)
    where: dict[str, Any] = {} if data_dir is None else {"data_dir": data_dir}
    if match := _BUILDER_CLASS.fullmatch(name):
        return _with_data(_build(match, where), name)
    try:
        return read_only_builder.builder_from_files(name, **where)
    except Exception:  # not found: may be a builder class of the user
        pass
    if folder.is_dir() and "/" in name:
        raise DataError(
            f"the folder {name} has no dataset_info.json: name the folder of a version that TFDS "
            "prepared, such as tfds:FOLDER/NAME/1.0.0"
        )
    how = f'prepare it with tfds.builder({name!r}, file_format="array_record")'
    try:
        builder = tfds.builder(name, **where)
    except ImportError as error:  # the builders of TFDS need TensorFlow
        raise DataError(
            f"the TFDS data set {name!r} is not prepared in {data_folder(data_dir)}: set data_dir "
            f"to where it is, or where TensorFlow is installed {how}.download_and_prepare() "
            f"({first_line(error)})"
        ) from None
    except Exception as error:  # TFDS raises many types for an unknown name
        raise DataError(f"TFDS knows no data set {name!r} ({first_line(error)})") from None
    return _with_data(builder, name)


def _build(match: re.Match[str], where: dict[str, Any]) -> tfds.core.DatasetBuilder:
    """Make the builder of a class of the user's, by its module and name."""
    code = SourceCode.of(f"{SourceCode.PREFIX}{match[1]}:{match[2]}")
    made = code.load("data.source")
    if not (isinstance(made, type) and issubclass(made, tfds.core.DatasetBuilder)):
        raise DataError(f"{match[0]} is not the class of a TFDS builder: name one in data.source")
    try:
        return made(**where)
    except Exception as error:  # code of the user
        raise DataError(
            f"the builder {match[0]} cannot be made ({type(error).__name__}: {first_line(error)}): "
            "correct it"
        ) from None


def _with_data(builder: tfds.core.DatasetBuilder, name: str) -> tfds.core.DatasetBuilder:
    """Return a builder whose data is prepared; DataError for another."""
    if not builder.info.splits:
        raise DataError(
            f"the TFDS data set {name!r} is not prepared in {builder.data_dir}: set data_dir to "
            f'where it is, or run {type(builder).__name__}(file_format="array_record")'
            ".download_and_prepare()"
        )
    return builder


def data_folder(given: str | None) -> str:
    """Return the folder of prepared data: as given, or the default of TFDS."""
    return given or constants.DATA_DIR


def flat_features(features: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each feature with its name; nested ones are named by their path."""
    for name, feature in features.items():
        inner = getattr(feature, "feature", feature)  # the items of a sequence
        if isinstance(inner, tfds.features.FeaturesDict):
            yield from flat_features(inner, f"{above}{name}/")
        else:
            yield above + name, inner


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, list | np.ndarray) and len(value) and isinstance(value[0], bytes):
        return [item.decode(errors="replace") for item in value]
    return value
