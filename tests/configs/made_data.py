"""Small data of the kinds that the configs name: TFDS builders, and tars as img2dataset writes.

Every image is one colour, and every caption of it names that colour and nothing else does.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from vlm.data.known_classes import known_classes

COLOURS = {
    "red": (230, 20, 20), "green": (20, 180, 30), "blue": (20, 40, 220), "black": (10, 10, 10),
    "white": (250, 250, 250), "yellow": (240, 230, 20), "orange": (245, 140, 10),
    "purple": (130, 20, 150), "gray": (128, 128, 128), "pink": (250, 150, 180),
}  # fmt: skip
SIZE = (50, 34)  # wider than high, as most of COCO
WORDNET = dict(zip(known_classes("imagenet1k").wordnet_ids, COLOURS, strict=False))


def jpeg(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", SIZE, COLOURS[colour]).save(out, "JPEG", quality=95)
    return out.getvalue()


def colour_of(number: int) -> str:
    return list(COLOURS)[number % len(COLOURS)]


def captions_of(number: int) -> list[str]:
    colour = colour_of(number)
    return [f"{word} {colour} wall." for word in ("A", "One", "Some", "That", "My")]


class CocoCaptions(tfds.core.GeneratorBasedBuilder):
    """The features that TFDS gives COCO's captions."""

    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="2014", description="as TFDS calls it")]  # noqa: RUF012

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "image/filename": tfds.features.Text(),
                    "image/id": np.int64,
                    "captions": tfds.features.Sequence(
                        {"id": np.int64, "text": tfds.features.Text()}
                    ),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(40),
            "val": self._generate_examples(10),
            "test": self._generate_examples(10),
        }

    def _generate_examples(self, count: int):
        for i in range(count):
            texts = [{"id": 5 * i + k, "text": text} for k, text in enumerate(captions_of(i))]
            yield (
                i,
                {
                    "image": jpeg(colour_of(i)),
                    "image/filename": f"COCO_{i:012d}.jpg",
                    "image/id": i,
                    "captions": texts,
                },
            )


class Imagenet2012(tfds.core.GeneratorBasedBuilder):
    """The features that TFDS gives ImageNet, of ten classes."""

    VERSION = tfds.core.Version("5.1.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=list(WORDNET)),
                    "file_name": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"validation": self._generate_examples(20)}

    def _generate_examples(self, count: int):
        names = list(WORDNET)
        for i in range(count):
            label = names[i % len(names)]
            yield (
                i,
                {
                    "image": jpeg(WORDNET[label]),
                    "label": label,
                    "file_name": f"ILSVRC2012_val_{i:08d}.JPEG",
                },
            )


def prepare_tfds(folder: Path) -> None:
    """Both data sets under `folder`."""
    tfds.disable_progress_bar()
    for builder in (CocoCaptions, Imagenet2012):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()


def write_tars(folder: Path, shards: int = 2, per_shard: int = 20) -> None:
    """Tars named and filled as img2dataset does."""
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(per_shard):
                key = f"{shard:05d}{i:04d}"
                text = captions_of(i)[i % 5]
                about = {
                    "key": key,
                    "caption": text,
                    "url": f"https://example.com/{key}.jpg",
                    "status": "success",
                    "error_message": None,
                    "width": SIZE[0],
                    "height": SIZE[1],
                    "original_width": SIZE[0],
                    "original_height": SIZE[1],
                    "exif": "{}",
                    "sha256": "0" * 64,
                }
                for ending, data in (
                    ("jpg", jpeg(colour_of(i))),
                    ("json", json.dumps(about).encode()),
                    ("txt", text.encode()),
                ):
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
