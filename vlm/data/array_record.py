"""ArrayRecord files of `tf.train.Example` records, as TFDS, Beam and `vlm data prepare` write them.

A feature with one value becomes that value, with several a list. Bytes are decoded as text, except
those of the image.
"""

import contextlib
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tensorflow_datasets.proto import tf_example_pb2

from vlm.config import DataConfig
from vlm.data import open_files
from vlm.data.columns import Groups
from vlm.data.examples import WHERE, Example, check_features, known_features
from vlm.data.faults import BadSample
from vlm.data.splits import split_files
from vlm.data.storage import READERS
from vlm.errors import DataError

_Example: Any = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue] (made on import)


class ArrayRecordSource:
    """Source over the records of some files, in order."""

    def __init__(self, names: list[str], config: DataConfig):
        check_installed()
        self._names, self._config, self._where = names, config, config.source
        try:
            with ThreadPoolExecutor(READERS) as pool:
                self._counts = list(pool.map(_count, names))
        except Exception as error:  # the reader raises its own types
            raise DataError(
                f"{config.source} cannot be read as ArrayRecord ({error}): check data.source"
            ) from None
        self._files = Groups(self._counts)
        if not len(self):
            raise DataError(f"{config.source} holds no records: check data.source")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        where = f"record {index} of {self._where}"
        try:
            number, row = self._files.find(int(index))
            with self._opened(number) as records:
                record = records[row]
        except Exception as error:
            why = f"{where} cannot be read ({error})"
            raise BadSample.failed_read(where, why, error) from None
        return parse(record, self._config.image, where)

    def _opened(self, number: int) -> contextlib.AbstractContextManager[Any]:
        name, count = self._names[number], self._counts[number]
        return open_files.OPEN.use(
            (name, count),
            lambda: _data_source()(f"{name}[0:{count}]"),  # with the range, the count is not read
            lambda records: records.__exit__(None, None, None),
        )


def _data_source() -> Any:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return ArrayRecordDataSource


def _count(name: str) -> int:
    return len(_data_source()(name))


def check_installed() -> None:
    """Raise a DataError if the package array-record is missing; it has no wheels for Windows."""
    if importlib.util.find_spec("array_record") is None:
        raise DataError(
            "ArrayRecord files need the package array-record, which has no release for Windows: "
            "use data in tar, Parquet or CSV files, or run vlm in WSL (Linux) or on macOS"
        )


def open_split(config: DataConfig, split: str) -> ArrayRecordSource:
    """Open the files of a split; DataError if they are missing, or lack wanted features."""
    source = ArrayRecordSource(split_files(config.source, split, config.train_split), config)
    known = known_features(source, config, config.source)
    check_features(config, known, f"the data set {config.source}")
    return source


def parse(record: bytes, image: str, where: str) -> Example:
    """Parse a record; the feature `image` stays bytes. BadSample if it is no `tf.train.Example`."""
    try:
        features = _Example.FromString(record).features.feature
    except Exception as error:  # protobuf's own types
        why = f"{where} is not a tf.train.Example ({error})"
        raise BadSample("broken record", where, why) from None
    example: Example = {WHERE: where}
    for name, feature in features.items():
        kind = feature.WhichOneof("kind")
        if kind is None:
            continue
        values: list[Any] = list(getattr(feature, kind).value)
        if kind == "bytes_list" and name != image:
            values = [value.decode(errors="replace") for value in values]
        example[name] = values[0] if len(values) == 1 else values
    return example


def serialize(example: Example) -> bytes:
    """Serialize an example for `parse`: bytes, texts, numbers, and lists of them."""
    message = _Example()
    for name, value in example.items():
        values = list(value) if isinstance(value, list | tuple) else [value]
        values = [v for v in values if v is not None]
        if name == WHERE or not values:
            continue
        feature = message.features.feature[name]
        if all(isinstance(v, bool | int) for v in values):
            feature.int64_list.value.extend(int(v) for v in values)
        elif all(isinstance(v, int | float) for v in values):
            feature.float_list.value.extend(float(v) for v in values)
        else:
            encoded = (v if isinstance(v, bytes) else str(v).encode() for v in values)
            feature.bytes_list.value.extend(encoded)
    return message.SerializeToString(deterministic=True)  # the order of a map is random else
