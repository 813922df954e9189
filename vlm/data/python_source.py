"""Data sets that a user gives as an object, or as `python:` and its import path.

The object is a data set, a mapping from split names to data sets, or a function of the split. A
data set has `len` and `[]`, such as a list, a Hugging Face `Dataset` or a TFDS data source; or it
is a grain `MapDataset`, an iterable (see `python_stream`), or a TFDS builder. Its elements are
dicts of features. An element that is None is skipped.
"""

import contextlib
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
from PIL import Image

from vlm.config import DataConfig, SourceCode
from vlm.data.columns import class_label_names, image_file, named_label
from vlm.data.examples import (
    WHERE,
    Example,
    Source,
    check_features,
    copy_metadata,
    flat_items,
    known_features,
    wanted_features,
)
from vlm.data.faults import BadSample
from vlm.data.splits import find_split
from vlm.errors import DataError, VlmError, first_line
from vlm.inputs.opening import image_of_array

NO_EXAMPLE = "no example"  # kind of a bad sample whose element is None
ENDLESS = sys.maxsize  # length of a grain data set after .repeat()
_FORM = '{"image": ..., "caption": ...}'


def is_named(config: DataConfig) -> bool:
    """Whether the source of a config is a data set in Python."""
    return not config.mixture and config.source.startswith(SourceCode.PREFIX)


def open_split(config: DataConfig, split: str) -> Source:
    """Open a split with random access.

    Raises:
        DataError: the split is missing, is an iterable, or lacks a feature that the config names.
        ConfigError: the object cannot be imported.
    """
    data = find_data(config, split)
    if _is_builder(data):
        from vlm.data.prepared import TfdsSource

        return TfdsSource(data, split, config)
    if is_iterable(data):
        raise DataError(
            f"{config.source} {split} is an iterable, which is read in order only, and this needs "
            "random access: give a data set with len and [], such as a list"
        )
    if len(data) == ENDLESS:
        raise DataError(
            f"{config.source} {split} is endless, and this reads each example once: leave out "
            ".repeat()"
        )
    return open_indexed(config, split)


def open_indexed(config: DataConfig, split: str) -> "PythonSource":
    """Open a data set with `len` and `[]`, which may be endless."""
    source = PythonSource(config, split, find_data(config, split))
    where = f"the data set {config.source} {split}"
    check_features(config, known_features(source, config, where), where)
    return source


def list_splits(config: DataConfig) -> list[str] | None:
    """List the splits of a mapping or a TFDS builder; None if there is one data set only.

    Empty for a function of the split, whose splits cannot be listed.
    """
    given = _given(config)
    if _is_function(given):
        if "split" in _parameters(given):
            return []
        given = _made(config, {"process_index": 0, "process_count": 1})
    if isinstance(given, Mapping):
        return list(given)
    return sorted(given.info.splits) if _is_builder(given) else None


def is_read_in_order(config: DataConfig) -> bool:
    """Whether the order of the training data is its own: a grain data set, or an iterable."""
    if config.access == "random":
        return False
    data = find_data(config, config.train_split)
    return isinstance(data, grain.MapDataset) or is_iterable(data)


def find_data(
    config: DataConfig, split: str, process_index: int = 0, process_count: int = 1
) -> Any:
    """Return the data set of a split; a function is called once for each split.

    Raises:
        DataError: there is no such split, or the object is not a data set.
    """
    given, name = _given(config), config.source
    if _is_function(given):
        values = {"split": split, "process_index": process_index, "process_count": process_count}
        made = _made(config, values)
        if "split" in _parameters(given):
            return _checked(made, f"{name} {split}")
        given = made
    if isinstance(given, Mapping):
        given = given[find_split(split, list(given), name)]
    elif split != config.train_split and not _is_builder(given):
        raise DataError(
            f"{name} is one data set without splits, so there is no split {split!r}: give a "
            f'mapping such as {{"train": ..., "{split}": ...}}, or set eval_split=None'
        )
    return _checked(given, f"{name} {split}")


def has_random_access(data: Any) -> bool:
    """Whether a data set has `len` and `[]`."""
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


def has_length(config: DataConfig) -> bool:
    """Whether the training data is a data set in Python with a finite length."""
    if not is_named(config):
        return False
    data = find_data(config, config.train_split)
    return has_random_access(data) and len(data) != ENDLESS


def is_iterable(data: Any) -> bool:
    """Whether a data set is read in order only."""
    return not (_is_builder(data) or has_random_access(data))


def label_names(config: DataConfig) -> list[str] | None:
    """Return the class names of `config.label` in training data that is read in order."""
    data = find_data(config, config.train_split)
    return Elements(config, data).label_names or getattr(data, "label_names", None)


def takes_process(config: DataConfig) -> bool:
    """Whether the data comes from a function that makes the part of each process."""
    given = _given(config)
    return _is_function(given) and {"process_index", "process_count"} <= _parameters(given)


@contextlib.contextmanager
def naming_errors(where: str, fix: str) -> Iterator[None]:
    """Turn an exception of a user's code into a DataError that names the place and the fix."""
    try:
        yield
    except (VlmError, MemoryError):
        raise
    except Exception as error:
        raise DataError(
            f"{where} raised {type(error).__name__} ({first_line(error)}): {fix}"
        ) from error


class Elements:
    """Converts the elements of a data set to examples."""

    def __init__(self, config: DataConfig, data: Any):
        self._image, self._label = config.image, config.label
        self._names = {name: names for name, names in _class_names(data) if names}
        self._wanted = set(wanted_features(config))
        # Class names of the label in the order of ids, if the data set has them.
        self.label_names: list[str] | None = self._names.get(config.label or "")

    def example(self, element: Any, where: str) -> Example:
        """Convert an element; BadSample if it is None, DataError if it is not as described."""
        if element is None:
            raise BadSample(NO_EXAMPLE, where, f"{where} is None, as a filter leaves it")
        if not isinstance(element, Mapping):
            raise DataError(f"{where} is a {type(element).__name__}: return a dict such as {_FORM}")
        example: Example = {WHERE: where}
        for feature, value in element.items():
            for name, inner in flat_items(str(feature), value, self._image):
                if name == self._image:
                    example[name] = _image(inner, f"the image of {where}")
                elif name not in self._wanted:
                    example[name] = inner
                elif name in self._names:
                    example[name] = named_label(
                        _plain(inner), self._names[name], name, where, wanted=name == self._label
                    )
                else:
                    example[name] = _plain(inner)
        return example


class PythonSource:
    """Source over a data set with `len` and `[]`.

    Code of users that is not known to be safe in several threads is called in one at a time.
    """

    def __init__(self, config: DataConfig, split: str, data: Any):
        self._config, self._split, self._where = config, split, f"{config.source} {split}"
        self._open(data)
        if not self._count:
            raise DataError(f"{self._where} has no examples: give a data set that has")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        where = f"example {index} of {self._where}"
        with naming_errors(where, "correct it, or return None to skip the example"), self._lock:
            element = self._data[int(index)]
            if self._holds_images and isinstance(element, Mapping):
                image = element.get(self._config.image)
                if isinstance(image, Image.Image):  # shared by all threads
                    image.load()
        return self._elements.example(element, where)

    def __getstate__(self) -> dict[str, Any]:
        own = {"config": self._config, "split": self._split, "count": self._count}
        return own if self._config.source.importable else own | {"data": self._data}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._config, self._split = state["config"], state["split"]
        self._where = f"{self._config.source} {self._split}"
        data = state["data"] if "data" in state else find_data(self._config, self._split)
        self._open(data)
        if self._count != state["count"]:
            raise DataError(
                f"{self._where} has {self._count:,} examples in a reader process, and "
                f"{state['count']:,} in the run: make it deterministic, or set data.workers to 0"
            )

    def _open(self, data: Any) -> None:
        data = self._data = _with_encoded_images(data, self._config.image)
        self._holds_images = isinstance(data, list | tuple)
        own_threads = self._holds_images or _hugging_face_features(data) is not None
        own_threads |= isinstance(data, grain.MapDataset) or hasattr(data, "dataset_info")
        self._lock = contextlib.nullcontext() if own_threads else threading.RLock()
        with naming_errors(f"len of {self._where}", "correct it"):
            self._count = len(data)
        self._elements = Elements(self._config, data)
        copy_metadata(self, data)
        self.label_names = self._elements.label_names or getattr(data, "label_names", None)


def check_workers(source: Any, config: DataConfig) -> None:
    """Raise a DataError if a source cannot be sent to reader processes."""
    import cloudpickle  # what grain sends it with

    if config.workers and not config.source.importable:
        try:
            cloudpickle.dumps(source)
        except Exception as error:
            raise DataError(
                f"{config.source} cannot be sent to the {config.workers} processes of "
                f"data.workers ({first_line(error)}): set data.workers to 0, or give the import "
                "path of a function that makes it"
            ) from None


def _given(config: DataConfig) -> Any:
    return SourceCode.of(config.source).load("data.source")


def _made(config: DataConfig, values: dict[str, Any]) -> Any:
    """Return what the function of a source makes of the arguments that it takes.

    It is called once for equal arguments, unless it makes an iterator, which can be read once.
    """
    code = SourceCode.of(config.source)
    function, opened = code.load("data.source"), code.opened
    wanted = _parameters(function)
    values = {name: value for name, value in values.items() if name in wanted}
    key = tuple(values.items())
    if key in opened:
        return opened[key]
    arguments = ", ".join(f"{name}={value!r}" for name, value in values.items())
    with naming_errors(
        f"{config.source} with {arguments or 'no arguments'}",
        "correct it, or set eval_split=None if it has no such split",
    ):
        if "split" in values and "split" not in _signature(function):
            made = function(values.pop("split"), **values)
        else:
            made = function(**values)
    if not isinstance(made, Iterator):
        opened[key] = made
    return made


def _is_builder(data: Any) -> bool:
    return hasattr(data, "as_data_source") and hasattr(data, "info")


def _is_function(given: Any) -> bool:
    is_data = hasattr(given, "__getitem__") or hasattr(given, "__iter__") or _is_builder(given)
    return isinstance(given, type) or (callable(given) and not is_data)


def _parameters(function: Callable) -> set[str]:
    """Return those of split, process_index and process_count that a function takes.

    Its only required parameter is the split, by any name.
    """
    parameters = _signature(function)
    known = {"split", "process_index", "process_count"} & parameters.keys()
    required = [p for p in parameters.values() if p.default is p.empty and p.kind in (0, 1)]
    if len(required) == 1 and required[0].name not in known - {"split"}:
        known.add("split")
    return known


def _signature(function: Callable) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # compiled
        return {"": inspect.Parameter("split", inspect.Parameter.POSITIONAL_ONLY)}


def _checked(data: Any, where: str) -> Any:
    """Return a data set if it is one that can be read; DataError with the fix otherwise."""
    if hasattr(data, "iloc"):
        raise DataError(f'{where} is a table of pandas: give its rows, table.to_dict("records")')
    if isinstance(data, Mapping) or data is None:
        raise DataError(
            f"{where} is {'None' if data is None else 'a mapping'}, and not a data set: give a "
            f"sequence of dicts such as {_FORM}, or set eval_split=None if there is no such split"
        )
    if has_random_access(data) or hasattr(data, "__iter__") or _is_builder(data):
        return data
    raise DataError(
        f"{where} is a {type(data).__name__}, which has neither len and [] nor iter: give a "
        f"sequence of dicts such as {_FORM}"
    )


def _hugging_face_features(data: Any) -> Any:
    """Return the features of a data set of Hugging Face in their JSON form, if it has them."""
    features = getattr(data, "features", None)
    to_dict = getattr(features, "to_dict", None)
    return None if to_dict is None else to_dict()


def _class_names(data: Any) -> Iterator[tuple[str, list[str]]]:
    """Yield the class names of each feature that has them."""
    if hasattr(data, "dataset_info"):  # a data source of TFDS
        from vlm.data.prepared import flat_features

        for name, feature in flat_features(data.dataset_info.features):
            yield name, list(getattr(feature, "names", None) or ())
    yield from class_label_names(_hugging_face_features(data))


def _with_encoded_images(data: Any, image: str) -> Any:
    """Leave the images of a Hugging Face `Dataset` encoded, unless it has a format of its own.

    So they are decoded in threads, and JPEG files only as large as a crop needs.
    """
    features, form = getattr(data, "features", None), getattr(data, "format", None)
    if not hasattr(data, "cast_column") or not isinstance(form, dict) or form.get("type"):
        return data
    feature: Any = features.get(image) if isinstance(features, dict) else None
    if not getattr(feature, "decode", False):
        return data
    return data.cast_column(image, type(feature)(decode=False))


def _image(value: Any, name: str) -> Any:
    value = image_file(value)
    if getattr(value, "shape", None) == ():
        value = value.item()
    if value is None or isinstance(value, Image.Image | bytes | str | os.PathLike):
        return value
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if len(getattr(value, "shape", ())) == 4:
        raise DataError(
            f"{name} is a batch of {len(value)} images: give one image in each element, such as "
            "without .batch, for vlm makes the batches"
        )
    return image_of_array(value, name)


def _plain(value: Any) -> Any:
    """Convert arrays, tensors and bytes of any library to Python's numbers, lists and texts."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
