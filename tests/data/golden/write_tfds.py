"""Writes golden/tfds/: a TFDS data set in TFRecord files, TFDS's default, with TensorFlow.

`python tests/data/golden/write_tfds.py`, where tensorflow, tensorflow-datasets and
importlib_resources are installed.
"""

import io
import pathlib
import shutil

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

OUT = pathlib.Path(__file__).parent / "tfds"


def jpeg(number: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (10, 12, 3), np.uint8)
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


class Animals(tfds.core.GeneratorBasedBuilder):
    """Numbered pictures with two captions each."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            "captions": tfds.features.Sequence({"text": tfds.features.Text(), "id": np.int64}),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 5), "test": self._generate_examples(5, 7)}

    def _generate_examples(self, first, end):
        for n in range(first, end):
            captions = [{"text": f"picture {n}", "id": n}, {"text": f"number {n}", "id": -n}]
            yield n, {"image": jpeg(n), "label": n % 2, "captions": captions}


def main() -> None:
    tfds.disable_progress_bar()
    shutil.rmtree(OUT, ignore_errors=True)
    sharded = tfds.download.DownloadConfig(num_shards=2)
    Animals(data_dir=str(OUT)).download_and_prepare(download_config=sharded)
    shutil.rmtree(OUT / "downloads", ignore_errors=True)


if __name__ == "__main__":
    main()
