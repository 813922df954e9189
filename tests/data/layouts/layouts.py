"""The layouts that data sets come in, written with images of every format, and how vlm reads them.

`python tests/data/layouts/layouts.py [FOLDER]` writes each layout with each format, reads every
pair with random access, as a stream, and after `vlm data prepare`, compares it with what Pillow and
the written texts state, and prints the counts. With the packages of the extra `peers`, every layout
is also read by a library that is not ours.
"""

import csv
import dataclasses
import functools
import hashlib
import io
import json
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from vlm.config import DataConfig, PreprocessConfig
from vlm.data.example_reader import ExampleReader
from vlm.data.examples import captions_of
from vlm.data.faults import BadSample
from vlm.data.prepare import Preparation, prepare
from vlm.data.transform_example import open_image_of
from vlm.inputs.preprocess import Preprocess

PREPROCESS = Preprocess(PreprocessConfig())

# Pillow's name of each format, how it is saved, and the ending that the world gives it.
FORMATS: dict[str, tuple[str, dict[str, Any], str]] = {
    "progressive JPEG": ("JPEG", {"progressive": True}, "jpg"),
    "CMYK JPEG": ("JPEG", {"mode": "CMYK"}, "jpeg"),
    "MPO": ("MPO", {"save_all": True}, "jpg"),
    "PNG": ("PNG", {}, "png"),
    "WEBP": ("WEBP", {"lossless": True}, "webp"),
    "GIF": ("GIF", {}, "gif"),
    "BMP": ("BMP", {}, "bmp"),
    "AVIF": ("AVIF", {}, "avif"),
    "TIFF": ("TIFF", {}, "tiff"),
    "JPEG 2000": ("JPEG2000", {}, "jp2"),
    "PPM": ("PPM", {}, "ppm"),
    "QOI": ("QOI", {}, "qoi"),
    "JFIF": ("JPEG", {}, "jfif"),
}
TEXTS = ("a dog, red", 'a "quoted" dog', "Käse 象 🦄", "tab\tand, comma", "it's 1/2 & <b>")


class Item(NamedTuple):
    """An image and its texts, before they are written."""

    number: int
    image: bytes
    ending: str
    caption: str
    re_caption: str
    label: str


Pair = tuple[str, tuple[str, ...]]  # of the pixels in RGB, and the captions


class Layout(NamedTuple):
    """How a data set is written, and the config that reads it."""

    write: Callable[[Path, list[Item]], DataConfig]
    captions: Callable[[Item], tuple[str, ...]]  # that the config names
    streams: bool = False


@functools.cache
def image(form: str, number: int) -> bytes:
    pillow, options, _ = FORMATS[form]
    options = dict(options)
    seed = [*form.encode(), number]
    pixels = np.random.default_rng(seed).integers(0, 256, (11 + number % 3, 13, 3), np.uint8)
    made = Image.fromarray(pixels).convert(options.pop("mode", "RGB"))
    if pillow == "MPO":
        options["append_images"] = [made.transpose(Image.Transpose.ROTATE_180)]
    out = io.BytesIO()
    made.save(out, pillow, **options)
    return out.getvalue()


def items(forms: Iterable[str], each: int) -> list[Item]:
    """`each` images of every format, in turns, all different."""
    found = []
    for n, form in ((n, form) for n in range(each) for form in forms):
        number = len(found)
        caption = f"{TEXTS[number % len(TEXTS)]} {number}"
        label = ("cat", "dog")[n * 2 >= each]
        made = image(form, number)
        found.append(Item(number, made, FORMATS[form][2], caption, f"re {number}", label))
    return found


# --------------------------------------------------------------------------------- layouts


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def fields(item: Item) -> bytes:
    made = {"caption": item.caption, "re_caption": item.re_caption, "width": 13, "exif": "{}"}
    return json.dumps(made).encode()


def shards(folder: Path, found: list[Item], members: Callable[[Item], dict[str, bytes]]) -> str:
    for shard, part in enumerate(np.array_split(np.arange(len(found)), 3)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for item in (found[i] for i in part):
                for name, data in members(item).items():
                    add(tar, name, data)
    return str(folder / "{00000..00002}.tar")


def _img2dataset(item: Item) -> dict[str, bytes]:
    key = f"{item.number:09d}"
    text = item.caption.encode()
    return {f"{key}.{item.ending}": item.image, f"{key}.txt": text, f"{key}.json": fields(item)}


def img2dataset_tar(folder: Path, found: list[Item]) -> DataConfig:
    return DataConfig(shards(folder, found, _img2dataset))


def img2dataset_recaption(folder: Path, found: list[Item]) -> DataConfig:
    return DataConfig(shards(folder, found, _img2dataset), captions=("re_caption",))


def dotted_tar(folder: Path, found: list[Item]) -> DataConfig:
    def members(item: Item) -> dict[str, bytes]:
        key = f"part.1/{item.number:04d}.v1.5"
        return {f"{key}.{item.ending}": item.image, f"{key}.txt": item.caption.encode()}

    return DataConfig(shards(folder, found, members))


def labelled_tar(folder: Path, found: list[Item]) -> DataConfig:
    def members(item: Item) -> dict[str, bytes]:
        return {
            f"{item.number}.{item.ending}": item.image,
            f"{item.number}.cls": item.label.encode(),
        }

    return DataConfig(shards(folder, found, members), label="cls", templates=("{}",))


def clip_benchmark(folder: Path, found: list[Item]) -> DataConfig:
    def members(item: Item) -> dict[str, bytes]:
        number = b"%d" % ("dog", "cat").index(item.label)
        return {f"s{item.number}.{item.ending}": item.image, f"s{item.number}.cls": number}

    (folder / "train").mkdir()
    (folder / "classnames.txt").write_text("dog\ncat\n")
    shards(folder / "train", found, members)
    for path in (folder / "train").glob("*.tar"):
        path.rename(path.with_name(f"{int(path.stem)}.tar"))
    (folder / "train" / "nshards.txt").write_text("3\n")
    return DataConfig(str(folder), label="label", templates=("{}",))


def img2dataset_files(folder: Path, found: list[Item]) -> DataConfig:
    for item in found:
        inside = folder / f"{item.number // 10:05d}"
        inside.mkdir(exist_ok=True)
        for name, data in _img2dataset(item).items():
            (inside / name).write_bytes(data)
    return DataConfig(str(folder), captions=("re_caption",))


def texts_beside(folder: Path, found: list[Item]) -> DataConfig:
    for item in found:
        (folder / f"{item.number:04d}.{item.ending.upper()}").write_bytes(item.image)
        (folder / f"{item.number:04d}.txt").write_text(f"{item.caption}\n{item.re_caption}\n")
    return DataConfig(str(folder))


def class_folders(folder: Path, found: list[Item]) -> DataConfig:
    for item in found:
        (folder / item.label).mkdir(exist_ok=True)
        (folder / item.label / f"{item.number:04d}.{item.ending}").write_bytes(item.image)
    return DataConfig(str(folder), label="label", templates=("{}",))


def rows(folder: Path, found: list[Item]) -> list[dict[str, str]]:
    (folder / "images").mkdir()
    made = []
    for item in found:
        name = f"images/{item.number:04d}.{item.ending}"
        (folder / name).write_bytes(item.image)
        made.append({"image": name, "caption": item.caption, "re_caption": item.re_caption})
    return made


def table(name: str, delimiter: str, folder: Path, found: list[Item]) -> DataConfig:
    with open(folder / name, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, ("image", "caption", "re_caption"), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows(folder, found))
    whole = name.startswith("captions")
    return DataConfig(str(folder if whole else folder / name))


def jsonl(folder: Path, found: list[Item]) -> DataConfig:
    lines = (json.dumps(row, ensure_ascii=False) for row in rows(folder, found))
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return DataConfig(str(folder / "rows.jsonl"), captions=("re_caption",))


def parquet_paths(folder: Path, found: list[Item]) -> DataConfig:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows(folder, found)), folder / "a.parquet"
    )
    return DataConfig(str(folder / "a.parquet"))


def structs(found: list[Item]) -> list[dict[str, Any]]:
    return [
        {
            "image": {"bytes": item.image, "path": f"{item.number}.{item.ending}"},
            "caption": [item.caption, item.re_caption],
        }
        for item in found
    ]


def parquet_bytes(folder: Path, found: list[Item]) -> DataConfig:
    import pyarrow
    import pyarrow.parquet

    for shard, part in enumerate(np.array_split(np.arange(len(found)), 3)):
        made = pyarrow.Table.from_pylist(structs([found[i] for i in part]))
        pyarrow.parquet.write_table(made, folder / f"{shard}.parquet", row_group_size=4)
    return DataConfig(str(folder / "*.parquet"))


def arrow(folder: Path, found: list[Item]) -> DataConfig:
    try:  # as the library writes it
        import datasets
    except ImportError:
        import pyarrow

        made = pyarrow.Table.from_pylist(structs(found))
        with pyarrow.ipc.new_stream(str(folder / "data.arrow"), made.schema) as writer:
            writer.write_table(made, max_chunksize=4)
        state = {"_data_files": [{"filename": "data.arrow"}]}
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
        return DataConfig(str(folder))
    kinds = {"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))}
    made = datasets.Dataset.from_list(structs(found), features=datasets.Features(kinds))
    made.save_to_disk(str(folder))
    return DataConfig(str(folder))


def array_record(folder: Path, found: list[Item]) -> DataConfig:
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    writer = ArrayRecordWriter(str(folder / "a.array_record"), "group_size:1")
    for item in found:
        record = tf_example_pb2.Example()
        for name, value in (("image", item.image), ("caption", item.caption.encode())):
            record.features.feature[name].bytes_list.value.append(value)
        writer.write(record.SerializeToString())
    writer.close()
    return DataConfig(str(folder / "*.array_record"))


@functools.cache  # TFDS wants a name for one class only
def builder() -> Any:
    import tensorflow_datasets as tfds

    class Layouts(tfds.core.GeneratorBasedBuilder):
        """The items as a TFDS data set."""

        VERSION = tfds.core.Version("1.0.0")
        found: ClassVar[list[Item]] = []

        def _info(self):
            kinds = {"image": tfds.features.Image(), "caption": tfds.features.Text()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(kinds))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for item in self.found:
                yield item.number, {"image": item.image, "caption": item.caption}

    tfds.disable_progress_bar()
    return Layouts


def tfds(folder: Path, found: list[Item]) -> DataConfig:
    builder().found = found
    builder()(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return DataConfig("tfds:layouts", data_dir=str(folder))


def _caption(item: Item) -> tuple[str, ...]:
    return (item.caption,)


def _re_caption(item: Item) -> tuple[str, ...]:
    return (item.re_caption,)


def _both(item: Item) -> tuple[str, ...]:
    return item.caption, item.re_caption


def _label(item: Item) -> tuple[str, ...]:
    return (item.label,)


LAYOUTS = {
    "img2dataset tar": Layout(img2dataset_tar, _caption, True),
    "img2dataset tar, re_caption": Layout(img2dataset_recaption, _re_caption, True),
    "tar, keys with dots": Layout(dotted_tar, _caption, True),
    "tar with cls": Layout(labelled_tar, _label, True),
    "CLIP_benchmark": Layout(clip_benchmark, _label),
    "img2dataset files": Layout(img2dataset_files, _re_caption),
    "texts beside": Layout(texts_beside, _both),
    "class folders": Layout(class_folders, _label),
    "captions.csv": Layout(functools.partial(table, "captions.csv", ","), _caption),
    "csv": Layout(functools.partial(table, "rows.csv", ","), _caption),
    "tsv": Layout(functools.partial(table, "rows.tsv", "\t"), _caption),
    "jsonl": Layout(jsonl, _re_caption),
    "parquet of paths": Layout(parquet_paths, _caption),
    "parquet of bytes": Layout(parquet_bytes, _both, True),
    "arrow": Layout(arrow, _both),
    "array_record": Layout(array_record, _caption),
    "tfds": Layout(tfds, _caption),
}


# --------------------------------------------------------------------------------- reading


def digest(made: Image.Image) -> str:
    """Of the pixels in RGB."""
    made = made.convert("RGB")
    return hashlib.sha256(repr(made.size).encode() + made.tobytes()).hexdigest()[:16]


def by_pillow(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as opened:
        return digest(opened)


def expected(layout: Layout, found: list[Item]) -> list[Pair]:
    return [(by_pillow(item.image), layout.captions(item)) for item in found]


def read(config: DataConfig) -> tuple[list[Pair], list[str]]:
    """The pairs of a config as training has them, and what is wrong with the others."""
    pairs, faults = [], []
    for one in ExampleReader(config, "train").read():
        try:
            if isinstance(one.example, BadSample):
                raise one.example
            opened = open_image_of(one.example, config, PREPROCESS, "an example")
            pairs.append((digest(opened), tuple(captions_of(one.example, config))))
        except BadSample as fault:
            faults.append(str(fault))
    return pairs, faults


def ways(layout: Layout, config: DataConfig, folder: Path) -> dict[str, DataConfig]:
    """Every way to the same pairs: by access, and after `prepare`."""
    config = dataclasses.replace(config, eval_split=None, access="random")
    found = {"random": config}
    if layout.streams:
        found["stream"] = dataclasses.replace(config, access="stream")
    for form in ("tar", "array_record"):
        out = folder / form
        prepare(config, "train", out, Preparation(form, examples=7), PREPROCESS)
        again = dataclasses.replace(config, source=str(out / f"train-*.{form}"), data_dir=None)
        found[f"prepared {form}"] = again
        if form == "tar":
            found["prepared tar, stream"] = dataclasses.replace(again, access="stream")
    return found


def compare(name: str, forms: Iterable[str], each: int, folder: Path) -> dict[str, list[int]]:
    """Of each way: pairs that were written, equal, different, lost and named, lost in silence."""
    layout, found = LAYOUTS[name], items(forms, each)
    written = folder / "data"
    written.mkdir(parents=True)
    config = layout.write(written, found)
    wanted = sorted(expected(layout, found))
    counts = {}
    for way, one in ways(layout, config, folder).items():
        pairs, faults = read(one)
        missing = list(wanted)
        for pair in pairs:
            if pair in missing:
                missing.remove(pair)
        equal = len(wanted) - len(missing)
        different = len(pairs) - equal
        silent = len(wanted) - len(pairs) - len(faults)
        counts[way] = [len(wanted), equal, different, len(faults), silent]
    return counts


def main() -> None:
    try:
        from layout_readers import reference
    except ImportError:  # without the extra `peers`
        reference = None

    each = 4
    root = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    head = ("layout", "read as", "pairs", "equal", "different", "named", "silent", "reference")
    print(("{:<28}{:<22}" + "{:>10}" * 5 + "  {}").format(*head))
    total = np.zeros(5, int)
    for name in LAYOUTS:
        sums: dict[str, np.ndarray] = {}
        agreed = "-"
        for number, form in enumerate(FORMATS):
            folder = root / name.replace(" ", "_") / str(number)
            for way, counts in compare(name, [form], each, folder).items():
                sums[way] = sums.get(way, np.zeros(5, int)) + counts
            if reference is not None:
                agreed = reference(name, folder / "data", items([form], each))
        for way, counts in sums.items():
            shown = agreed if way == "random" else ""
            print(
                ("{:<28}{:<22}" + "{:>10}" * 5 + "  {}").format(name, way, *counts.tolist(), shown)
            )
            total += counts
    print(("{:<28}{:<22}" + "{:>10}" * 5).format("all", "", *total.tolist()))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "peers"))
    main()
