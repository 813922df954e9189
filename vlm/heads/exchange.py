"""Indexes of another program: the folders of clip-retrieval.

A clip-retrieval folder (github.com/rom1504/clip-retrieval) holds `img_emb/img_emb_0.npy`,
`text_emb/text_emb_0.npy` and `metadata/metadata_0.parquet`, each in equal partitions, with the
columns `image_path` and `caption` among the metadata.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlm.errors import CheckpointError, ConfigError, DataError
from vlm.heads.items import Id, Stored
from vlm.heads.metadata import Value
from vlm.heads.retrieval import RetrievalIndex

PARTITION = 1 << 18  # rows
PATH = "image_path"
Modality = Literal["img", "text"]


def read_clip_retrieval(
    folder: str | os.PathLike, model: Any, modality: Modality = "img", dtype: Stored = "float32"
) -> RetrievalIndex:
    """An index of the embeddings in a clip-retrieval folder, with its metadata.

    The ids are the paths of the images, or running numbers where the metadata has none.

    Args:
        folder: as `clip-retrieval inference` writes it.
        model: the model that made the embeddings.
        modality: whose embeddings, "img" or "text".
        dtype: of the index.

    Raises:
        CheckpointError: no such embeddings, or partitions that disagree with their metadata.
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
    width = np.asarray(model.encode_text(["a"])).shape[1]
    metadata = _partitions(folder, "metadata", "parquet")
    index = RetrievalIndex(model, dtype=dtype)
    for number, file in parts.items():
        try:
            z = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}): copy it again") from None
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
        ids: list[Id] = [
            path if isinstance(path, str | int) else len(index) + i for i, path in enumerate(paths)
        ]
        if len(z):
            index.add(np.asarray(z, np.float32), ids=ids, metadata=columns)
    return index


def write_clip_retrieval(index: RetrievalIndex, folder: str | os.PathLike) -> None:
    """Write the embeddings and metadata of an index of images as a clip-retrieval folder.

    Raises:
        CheckpointError: the folder has files in it already.
        ConfigError: the index is empty.

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
        raise CheckpointError(f"{folder} is there already: choose a new folder")
    ids, columns = index.ids, index.columns
    for number, start in enumerate(range(0, len(ids), PARTITION)):
        rows = slice(start, start + PARTITION)
        part: dict[str, Sequence[Value]] = {PATH: [str(name) for name in ids[rows]]}
        part |= {name: column[rows] for name, column in columns.items() if name != PATH}
        write_partition(folder, number, index.embeddings(ids[rows]), part)


def write_partition(
    folder: Path, number: int, z: np.ndarray, columns: Mapping[str, Sequence[Value]]
) -> None:
    """One partition of a clip-retrieval folder, metadata last; a reader never sees half of a file.

    Args:
        folder: the whole folder.
        number: of the partition, from 0.
        z: (n, d) embeddings of images.
        columns: their metadata, with `image_path`.
    """
    import pyarrow
    import pyarrow.parquet

    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    embeddings = folder / "img_emb" / f"img_emb_{number}.npy"
    metadata = folder / "metadata" / f"metadata_{number}.parquet"
    partial = embeddings.with_suffix(".partial")
    with open(partial, "wb") as file:
        np.save(file, z, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, embeddings)
    partial = metadata.with_suffix(".partial")
    pyarrow.parquet.write_table(pyarrow.table(columns), partial)
    os.replace(partial, metadata)


def _partitions(folder: Path, kind: str, suffix: str) -> dict[int, Path]:
    """The files of a kind by the number of their partition, in order."""
    found = {
        int(match[1]): file
        for file in (folder / kind).glob(f"{kind}_*.{suffix}")
        if (match := re.fullmatch(rf"{kind}_(\d+)\.{suffix}", file.name))
    }
    return dict(sorted(found.items()))


def _columns(file: Path) -> dict[str, list[Value]]:
    """The columns of a Parquet file that hold texts and numbers."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"{file} cannot be read ({error}): copy it again") from None
    return dict(_plain(table))


def _plain(table: Any) -> Iterator[tuple[str, list[Value]]]:
    import pyarrow.types as types

    for name in table.column_names:
        kind = table.schema.field(name).type
        if types.is_string(kind) or types.is_large_string(kind) or types.is_primitive(kind):
            values = table.column(name).to_pylist()
            if all(value is None or isinstance(value, str | int | float) for value in values):
                yield name, values
