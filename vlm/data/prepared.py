"""Prepared TFDS data sets, by name or by builder, read without TensorFlow."""

from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vlm.config import DataConfig
from vlm.data.examples import Example, check_features
from vlm.errors import DataError


def open_prepared(name: str, split: str, config: DataConfig) -> "TfdsSource":
    """A split of the data set that TFDS knows by `name`.

    Raises:
        DataError: it is unknown or not prepared, or has no such split or feature.
    """
    return TfdsSource(_prepared(name, config.data_dir), split, config)


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
