"""Import from and export to the index folders of clip-retrieval.

A clip-retrieval folder (github.com/rom1504/clip-retrieval) holds `img_emb/img_emb_0.npy`,
`text_emb/text_emb_0.npy` and `metadata/metadata_0.parquet`, each in equal partitions, with the
columns `image_path` and `caption` among the metadata.
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlm.errors import CheckpointError, ConfigError, DataError, brief
from vlm.heads.encoder import Encoder
from vlm.heads.filters import Value
from vlm.heads.index_folder import mapped, write_array
from vlm.heads.items import Id, Stored
from vlm.heads.model_identity import width_of
from vlm.heads.retrieval import RetrievalIndex

PARTITION = 1 << 18  # rows
PATH = "image_path"
INTEGER = "id_is_integer"  # a column that vlm adds: True if the id is an integer, stored as text
Modality = Literal["img", "text"]
_log = logging.getLogger(__name__)


def read_clip_retrieval(
    folder: str | os.PathLike, model: Encoder, modality: Modality = "img", dtype: Stored = "float32"
) -> RetrievalIndex:
    """Read the embeddings and metadata of a clip-retrieval folder into an index.

    The ids are the image paths, or running numbers if the metadata has none. Folders written by
    `write_clip_retrieval` keep their ids, with the same types. Columns that hold neither texts nor
    numbers are skipped and named in a warning.

    Args:
        folder: as `clip-retrieval inference` writes it.
        model: the model that made the embeddings.
        modality: whose embeddings, "img" or "text".
        dtype: of the index.

    Raises:
        CheckpointError: no such embeddings, or partitions that do not match their metadata.
        ConfigError: embeddings of another width than the model's.

    Example:
        >>> from vlm.heads import read_clip_retrieval, write_clip_retrieval
        >>> index = vlm.RetrievalIndex(model)
        >>> index.add(pictures, ids=["red.png", "green.png", "blue.png"])
        >>> write_clip_retrieval(index, folder / "from-elsewhere")
        >>> read_clip_retrieval(folder / "from-elsewhere", model).ids
        ('red.png', 'green.png', 'blue.png')
    """
    folder = Path(folder)
    parts = _partitions(folder, f"{modality}_emb", "npy")
    if not parts:
        raise CheckpointError(
            f"{folder} has no {modality}_emb/{modality}_emb_0.npy: give a folder that "
            "clip-retrieval wrote"
        )
    width = width_of(model)
    metadata = _partitions(folder, "metadata", "parquet")
    index = RetrievalIndex(model, dtype=dtype)
    for number, file in parts.items():
        z = mapped(file, "copy it again")
        if z.ndim != 2 or z.shape[1] != width:
            raise ConfigError(
                f"{file} has shape {z.shape} and {model.name} makes embeddings of {width} "
                "dimensions: load the model that made them"
            )
        columns = _columns(metadata[number]) if number in metadata else {}
        for name, column in columns.items():
            if len(column) != len(z):
                raise CheckpointError(
                    f"{file} has {len(z)} rows and column {name!r} of its metadata {len(column)}: "
                    "copy the folder again"
                )
        paths = columns.pop(PATH, None) or [None] * len(z)
        integers = columns.pop(INTEGER, None) or [False] * len(z)
        ids = [
            _id_of(path, bool(number), len(index) + i)
            for i, (path, number) in enumerate(zip(paths, integers, strict=True))
        ]
        if len(z):
            index.add(np.asarray(z, np.float32), ids=ids, metadata=columns)
    return index


def write_clip_retrieval(index: RetrievalIndex, folder: str | os.PathLike) -> None:
    """Write the embeddings and metadata of an index of images as a clip-retrieval folder.

    The ids become the column `image_path`, as texts; `id_is_integer` marks integer ids, if any.

    Raises:
        CheckpointError: the folder is not empty.
        ConfigError: the index is empty, or has metadata columns of these names.
        DataError: a column of texts and numbers, or a text that is not valid Unicode.

    Example:
        >>> from vlm.heads import write_clip_retrieval
        >>> index = vlm.RetrievalIndex(model)
        >>> index.add(pictures, ids=["red.png", "green.png", "blue.png"])
        >>> write_clip_retrieval(index, folder / "clip-retrieval")
    """
    folder = Path(folder)
    if not len(index):
        raise ConfigError("the index is empty: add items before writing it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists already: choose a new folder")
    ids, columns = index.ids, index.columns
    for name in {PATH, INTEGER} & columns.keys():
        raise ConfigError(
            f"the index has a metadata column {name!r}, which the folder uses for ids: add the "
            "items with another column name"
        )
    integers = any(isinstance(name, int) for name in ids)
    for number, start in enumerate(range(0, len(ids), PARTITION)):
        rows = slice(start, start + PARTITION)
        part: dict[str, Sequence[Value]] = {PATH: [str(name) for name in ids[rows]]}
        if integers:
            part[INTEGER] = [isinstance(name, int) for name in ids[rows]]
        part |= {name: column[rows] for name, column in columns.items()}
        write_partition(folder, number, index.embeddings(ids[rows]), part)


def write_partition(
    folder: Path, number: int, z: np.ndarray, columns: Mapping[str, Sequence[Value]]
) -> None:
    """Write one partition of a clip-retrieval folder; each file atomically, the metadata last.

    Args:
        folder: the clip-retrieval folder.
        number: of the partition, from 0.
        z: (n, d) embeddings of images.
        columns: their metadata, with `image_path`.
    """
    import pyarrow
    import pyarrow.parquet

    arrays = {name: _array(name, column) for name, column in columns.items()}
    if wrong := [name for name, column in columns.items() if len(column) != len(z)]:
        raise DataError(
            f"there are {len(z)} embeddings and {len(columns[wrong[0]])} values of {wrong[0]}: an "
            "encoder of videos takes the paths of video files"
        )
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    embeddings = folder / "img_emb" / f"img_emb_{number}.npy"
    metadata = folder / "metadata" / f"metadata_{number}.parquet"
    partial = embeddings.with_suffix(".partial")
    write_array(partial, z)
    os.replace(partial, embeddings)
    partial = metadata.with_suffix(".partial")
    pyarrow.parquet.write_table(pyarrow.table(arrays), partial)
    os.replace(partial, metadata)


def _array(name: str, column: Sequence[Value]) -> Any:
    """Convert a column to an Arrow array.

    Raises:
        DataError: texts and numbers in one column, or a text that is not valid Unicode.
    """
    import pyarrow

    kinds = {type(value) for value in column} - {type(None)}
    try:
        if len(kinds - {int, float}) > 1 or (kinds & {int, float} and kinds - {int, float}):
            raise ValueError(f"it holds {' and '.join(sorted(k.__name__ for k in kinds))}")
        return pyarrow.array(column)
    except (ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise DataError(
            f"column {name!r} cannot be written as Parquet ({error}): give values of one type"
        ) from None


def _id_of(path: Value, is_integer: bool, number: int) -> Id:
    """Return the id of a row: its path, as an integer if it was one, or the running number."""
    if is_integer:
        try:
            return int(path)  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError):
            raise CheckpointError(
                f"the {PATH} {brief(path)} of row {number:,} is not an integer, but {INTEGER} is "
                "true: copy the folder again"
            ) from None
    return path if isinstance(path, str | int) and not isinstance(path, bool) else number


def _partitions(folder: Path, kind: str, suffix: str) -> dict[int, Path]:
    """Return the files of a kind by partition number, in order."""
    partitions = {
        int(match[1]): file
        for file in (folder / kind).glob(f"{kind}_*.{suffix}")
        if (match := re.fullmatch(rf"{kind}_(\d+)\.{suffix}", file.name))
    }
    return dict(sorted(partitions.items()))


def _columns(file: Path) -> dict[str, list[Value]]:
    """Read the columns of a Parquet file that hold texts and numbers."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"{file} cannot be read ({error}): copy it again") from None
    return dict(_plain(file, table))


def _plain(file: Path, table: Any) -> Iterator[tuple[str, list[Value]]]:
    import pyarrow.types as types

    left_out = []
    for name in table.column_names:
        kind = table.schema.field(name).type
        text = types.is_string(kind) or types.is_large_string(kind)
        plain = text or types.is_primitive(kind) or types.is_null(kind)
        values = table.column(name).to_pylist() if plain else None
        if values is None or not all(v is None or isinstance(v, str | int | float) for v in values):
            left_out.append(f"{name} ({kind})")
        else:
            yield name, values
    if left_out:
        _log.warning("left out columns of %s: %s", file, ", ".join(left_out))
