"""The same numbered pictures as every kind of source: caption `picture 7` is on the 7th."""

import dataclasses
import io
import json
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from vlm.config import AugmentConfig, DataConfig, FieldFilter, MixturePart, PreprocessConfig
from vlm.data.array_record import serialize
from vlm.data.shard_index import beside as beside_shards
from vlm.data.shard_index import write_index
from vlm.data.storage import expand
from vlm.data.tfrecord import masked_crc32c
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import train_bpe

COUNT, SHARDS = 45, 6
TOKENIZER = train_bpe([f"picture {i}" for i in range(200)], 300, 12)
PREPROCESS = Preprocess(PreprocessConfig(image_size=8))


def jpeg(number: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (10, 12, 3), np.uint8)
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def members(number: int) -> list[tuple[str, bytes]]:
    fields = {"score": number / 10, "language": "en" if number % 2 else "de"}
    return [
        (f"{number:06d}.jpg", jpeg(number)),
        (f"{number:06d}.txt", f"picture {number}".encode()),
        (f"{number:06d}.json", json.dumps(fields).encode()),
    ]


def tars(folder: Path, shards: int = SHARDS) -> str:
    for shard, numbers in enumerate(np.array_split(np.arange(COUNT), shards)):
        write_tar(folder / f"{shard:03d}.tar", [m for n in numbers.tolist() for m in members(n)])
    return str(folder / f"{{000..{shards - 1:03d}}}.tar")


def tars_in_parts(folder: Path) -> DataConfig:
    """Two shards with an index, which are streamed in four parts each."""
    source = tars(folder, 2)
    names = expand(source)
    write_index(names, beside_shards(names))
    return DataConfig(source, access="stream", interleave=4)


def parquet_in_parts(folder: Path) -> DataConfig:
    """Two files of a single row group, which are streamed in five parts each."""
    import pyarrow.parquet

    for shard, numbers in enumerate(np.array_split(np.arange(COUNT), 2)):
        pyarrow.parquet.write_table(table_with_bytes(numbers.tolist()), folder / f"{shard}.parquet")
    return DataConfig(str(folder / "*.parquet"), interleave=4)


def tars_beside_tables(folder: Path) -> str:
    """Images alone in the shards; their texts in a table beside each, as img2dataset writes it."""
    import pyarrow
    import pyarrow.parquet

    for shard, numbers in enumerate(np.array_split(np.arange(COUNT), SHARDS)):
        members = [(f"{n:06d}.jpg", jpeg(n)) for n in numbers.tolist()]
        write_tar(folder / f"{shard:03d}.tar", members)
        rows = [
            {"key": f"{n:06d}", "caption": f"picture {n}", "language": "en" if n % 2 else "de"}
            for n in reversed(numbers.tolist())
        ]
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, folder / f"{shard:03d}.parquet")
    return str(folder / "*.tar")


def images(folder: Path) -> list[str]:
    for number in range(COUNT):
        (folder / f"{number:03d}.jpg").write_bytes(jpeg(number))
    return [f"{number:03d}.jpg" for number in range(COUNT)]


def rows(folder: Path) -> list[dict]:
    return [{"image": name, "caption": f"picture {i}"} for i, name in enumerate(images(folder))]


def csv(folder: Path) -> DataConfig:
    lines = ["image,caption", *(f"{row['image']},{row['caption']}" for row in rows(folder))]
    (folder / "captions.csv").write_text("\n".join(lines))
    return DataConfig(str(folder))


def jsonl(folder: Path) -> DataConfig:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows(folder))))
    return DataConfig(str(folder / "rows.jsonl"))


def beside(folder: Path) -> DataConfig:
    for i, name in enumerate(images(folder)):
        (folder / name).with_suffix(".txt").write_text(f"picture {i}\n")
    return DataConfig(str(folder))


def class_folders(folder: Path) -> DataConfig:
    for number in range(COUNT):
        inside = folder / ("odd" if number % 2 else "even") / f"picture {number}"
        inside.mkdir(parents=True)
        (inside / "of it.jpg").write_bytes(jpeg(number))
    return DataConfig(str(folder), label="label")


def parquet_paths(folder: Path) -> DataConfig:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(folder)), folder / "rows.parquet")
    return DataConfig(str(folder / "rows.parquet"))


def table_with_bytes(numbers: list[int]):
    import pyarrow

    return pyarrow.Table.from_pylist(
        [
            {"image": {"bytes": jpeg(n), "path": None}, "caption": f"picture {n}", "score": n / 10}
            for n in numbers
        ]
    )


def parquet_bytes(folder: Path) -> DataConfig:
    import pyarrow.parquet

    for shard, numbers in enumerate(np.array_split(np.arange(COUNT), SHARDS)):
        table = table_with_bytes(numbers.tolist())
        pyarrow.parquet.write_table(table, folder / f"{shard}.parquet", row_group_size=3)
    return DataConfig(str(folder / "*.parquet"))


def arrow(folder: Path) -> DataConfig:
    import pyarrow

    files = []
    for shard, numbers in enumerate(np.array_split(np.arange(COUNT), 2)):
        table = table_with_bytes(numbers.tolist())
        files.append({"filename": f"data-{shard:05d}-of-00002.arrow"})
        with pyarrow.ipc.new_stream(str(folder / files[-1]["filename"]), table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return DataConfig(str(folder))


def array_record(folder: Path) -> DataConfig:
    from array_record.python.array_record_module import ArrayRecordWriter

    for shard, numbers in enumerate(np.array_split(np.arange(COUNT), 3)):
        writer = ArrayRecordWriter(str(folder / f"{shard}.array_record"), "group_size:1")
        for n in numbers.tolist():
            writer.write(serialize({"image": jpeg(n), "caption": f"picture {n}", "score": n / 10}))
        writer.close()
    return DataConfig(str(folder / "*.array_record"))


def tfrecord(folder: Path) -> DataConfig:
    def head(length: int) -> bytes:
        size = struct.pack("<Q", length)
        return size + struct.pack("<I", masked_crc32c(size))

    for shard, numbers in enumerate(np.array_split(np.arange(COUNT), 3)):
        with open(folder / f"{shard}.tfrecord", "wb") as file:
            for n in numbers.tolist():
                record = serialize({"image": jpeg(n), "caption": f"picture {n}", "score": n / 10})
                file.write(head(len(record)) + record + bytes(4))
    return DataConfig(str(folder / "*.tfrecord"))


def mixture(folder: Path) -> DataConfig:
    for name in ("tars", "csv"):
        (folder / name).mkdir()
    return DataConfig(
        mixture=(
            MixturePart(tars(folder / "tars"), weight=2.0, access="stream"),
            MixturePart(csv(folder / "csv").source, weight=1.0),
        ),
        interleave=4,
    )


KINDS: dict[str, Callable[[Path], DataConfig]] = {
    "tar, streamed": lambda folder: DataConfig(tars(folder), access="stream", interleave=4),
    "tar, filtered": lambda folder: DataConfig(
        tars(folder),
        access="stream",
        interleave=4,
        filters=(FieldFilter("language", one_of=("en",)),),
    ),
    "tar in parts": tars_in_parts,
    "parquet in parts": parquet_in_parts,
    "tar, indexed": lambda folder: DataConfig(tars(folder)),
    "tar with tables, streamed": lambda folder: DataConfig(
        tars_beside_tables(folder),
        access="stream",
        interleave=4,
        filters=(FieldFilter("language", one_of=("en",)),),
    ),
    "parquet of bytes": lambda folder: dataclasses.replace(parquet_bytes(folder), interleave=4),
    "parquet of paths": parquet_paths,
    "arrow": arrow,
    "array_record": array_record,
    "tfrecord": tfrecord,
    "csv": csv,
    "jsonl": jsonl,
    "folder with texts": beside,
    "class folders": class_folders,
    "mixture": mixture,
}


def make(kind: str, folder: Path) -> DataConfig:
    """The config of a kind of source, written into `folder`, quick to read and all at random."""
    folder.mkdir()
    return dataclasses.replace(
        KINDS[kind](folder),
        eval_split=None,
        augment=AugmentConfig(crop=(0.5, 1.0), jitter=0.3, flip=True),
        prefetch=0,
        shuffle=20,
    )


def numbers_of(batch: dict) -> list[int]:
    return [int(text.split()[-1]) for text in TOKENIZER.decode(batch["tokens"])]
