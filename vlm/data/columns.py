"""Conversion of Parquet and Arrow columns to features, compatible with Hugging Face `datasets`.

A field of a struct, or of a list of structs, is a separate feature: `captions/text`. An image is
bytes, a file path (relative to the table), a struct of both, or a list of one of these. A class
label becomes its name; `datasets` stores the names in the metadata of the schema, under the key
`huggingface`. Rows of img2dataset whose download failed are left out.
"""

import bisect
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from pyarrow import types

from vlm.config import DataConfig
from vlm.data.examples import WHERE, Example, check_features, flat_items, wanted_features
from vlm.data.faults import BadSample
from vlm.data.url_tables import download_advice, url_column
from vlm.errors import DataError
from vlm.paths import is_remote

# Columns that img2dataset writes about each download.
_STATUS, _SUCCESS = "status", "success"
_DOWNLOADED = {_STATUS, "error_message", "key"}


class Columns:
    """Features in the columns of one file; converts its rows to examples."""

    def __init__(self, schema: Any, config: DataConfig, file: str, features: Any = None):
        self._config, self._folder, self._file = config, os.path.dirname(file), file
        self._fields = {field.name: field.type for field in schema}
        self._types = dict(_flat_types(schema, config.image))
        self._classes = dict(class_label_names(_saved_features(schema) or features or {}))
        # Class names of the label in the order of ids, if the file has them.
        self.label_names: list[str] | None = self._classes.get(config.label or "")
        names = [config.image, *wanted_features(config)]
        self.has_failed = set(schema.names) >= _DOWNLOADED
        names += [_STATUS] * self.has_failed
        columns = [name if name in schema.names else name.partition("/")[0] for name in names]
        # Existing columns with the image and the texts, and with the texts alone.
        self.wanted = [name for name in dict.fromkeys(columns) if name in schema.names]
        self.texts = [name for name in dict.fromkeys(columns[1:]) if name in schema.names]

    @property
    def image_is_path(self) -> bool:
        """Whether the image column has only paths."""
        return _is_text(_item(self._types[self._config.image]))

    def check(self) -> None:
        """Raise a DataError if a wanted feature is missing, or is neither an image nor a text."""
        config, where = self._config, f"the table {self._file}"
        try:
            check_features(config, self._types, where)
        except DataError as error:
            raise DataError(f"{error}{self._advice()}") from None
        if not _is_image(_item(self._types[config.image])):
            raise DataError(
                f"the feature {config.image!r} of {where} that data.image names has no image but "
                f"{self._types[config.image]}: name one with bytes, paths, or a struct of both"
            )
        for name in () if config.label else config.captions:
            kind = self._types[name]
            if not (name in self._classes or _is_text(_item(kind)) or types.is_null(_item(kind))):
                raise DataError(
                    f"the feature {name!r} of {where} that data.captions names has no text but "
                    f"{kind}: name one that has"
                )

    def _advice(self) -> str:
        """Return what to do if there is no image feature of the name in the config."""
        if self._config.image in self._types:
            return ""
        images = [
            name
            for name, kind in self._fields.items()
            if _is_image(_item(kind)) and not (_is_text(_item(kind)) or types.is_null(kind))
        ]
        if images:
            return f": set data.image to {' or '.join(map(repr, images))}"
        url = url_column(self._types)
        if url is None:
            return ""
        advice = download_advice(self._config, self._file, list(self._types), url)
        return f"; {url} holds addresses: {advice}"

    def example(self, row: dict[str, Any], where: str) -> Example:
        """Convert a row at `where` to an example; BadSample if its class label has no name."""
        image = self._config.image
        example: Example = {WHERE: where}
        for column, value in row.items():
            for name, inner in flat_items(column, value, image):
                if name == image:
                    example[name] = self._image(inner, where)
                elif name in self._classes:
                    names, wanted = self._classes[name], name == self._config.label
                    example[name] = named_label(inner, names, name, where, wanted=wanted)
                else:
                    example[name] = inner
        return example

    def failed(self, row: dict[str, Any]) -> bool:
        """Whether a row is an address that img2dataset could not download."""
        return self.has_failed and row.get(_STATUS) != _SUCCESS

    def _image(self, value: Any, where: str) -> Any:
        if isinstance(value, list):
            if len(value) != 1:
                why = f"{where} has {len(value)} images in {self._config.image}, in place of one"
                raise BadSample("several images" if value else "no image", where, why)
            value = value[0]
        value = image_file(value)
        if isinstance(value, str) and not is_remote(value):
            value = os.path.join(self._folder, os.path.expanduser(value))
        return value


def image_file(value: Any) -> Any:
    """Return the bytes of an image, else its path, from a struct of both; None for neither."""
    if isinstance(value, dict):
        data = value.get("bytes")
        value = value.get("path") if data is None else data
    return None if isinstance(value, str) and value == "" else value


def named_label(value: Any, names: list[str], feature: str, where: str, *, wanted: bool) -> Any:
    """Return the name of a class label, or those of a list.

    BadSample if a label that training needs (`wanted`) has no name; any other is None then.
    """
    if isinstance(value, list):
        return [named_label(item, names, feature, where, wanted=wanted) for item in value]
    if value is None or isinstance(value, str):
        return value
    if 0 <= value < len(names):
        return names[value]
    if not wanted:
        return None
    why = f"{where} has the {feature} {value}, but there are {len(names)} classes"
    raise BadSample("no label", where, why)


class Groups:
    """Sizes of consecutive groups of rows, to find a row by its index."""

    def __init__(self, counts: Iterable[int]):
        self._ends = list(itertools.accumulate(counts, initial=0))

    def __len__(self) -> int:
        return self._ends[-1]

    def find(self, index: int) -> tuple[int, int]:
        """Return the group of row `index`, and its number in the group."""
        group = bisect.bisect_right(self._ends, index) - 1
        return group, index - self._ends[group]


def same_label_names(columns: list[Columns], config: DataConfig) -> list[str] | None:
    """Return the class names of `config.label` in several files; DataError if they differ."""
    for one in columns[1:]:
        if one.label_names != columns[0].label_names:
            raise DataError(
                f"{columns[0]._file} and {one._file} have other class names of {config.label!r}, "
                "so one number would mean two classes: read them as sources of their own"
            )
    return columns[0].label_names if columns else None


def _saved_features(schema: Any) -> dict[str, Any] | None:
    """Read the features in the metadata of a schema, if `datasets` wrote it."""
    try:
        return json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return None


def class_label_names(features: Any, above: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield the name and classes of each class-label feature, in the JSON form of `datasets`."""
    for name, feature in features.items() if isinstance(features, dict) else ():
        while isinstance(feature, list) or (
            isinstance(feature, dict) and feature.get("_type") in ("Sequence", "List", "LargeList")
        ):  # list items, in the formats of all versions of `datasets`
            feature = feature[0] if isinstance(feature, list) else feature.get("feature")
        if not isinstance(feature, dict):
            continue
        if feature.get("_type") == "ClassLabel" and feature.get("names"):
            yield above + name, list(feature["names"])
        elif not isinstance(feature.get("_type"), str):
            yield from class_label_names(feature, f"{above}{name}/")


def _flat_types(fields: Any, image: str, above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the name and type of each feature; nested ones are named by their path."""
    for field in fields:
        name, inner = above + field.name, _item(field.type)
        if types.is_struct(inner) and name != image:
            yield from _flat_types(list(inner), image, name + "/")
        else:
            yield name, field.type


def _item(kind: Any) -> Any:
    """Return the item type of a (nested) list; other types are unchanged."""
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    return kind


def _is_text(kind: Any) -> bool:
    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_image(kind: Any) -> bool:
    if types.is_struct(kind):
        return any(field.name in ("bytes", "path") for field in kind)
    if types.is_dictionary(kind):
        kind = kind.value_type
    binary = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    return binary or types.is_fixed_size_binary(kind) or _is_text(kind) or types.is_null(kind)
