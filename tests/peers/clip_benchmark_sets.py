"""Data sets of made images in CLIP_benchmark's layout, written by its own code.

The 38 are its collection `vtab+` and its two best-known retrieval sets: its own class names and
templates where it carries them, made names in the right number elsewhere.
"""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

# Classes of the data sets whose names CLIP_benchmark takes from their own files.
COUNTS = {
    "objectnet": 113, "voc2007": 20, "voc2007_multilabel": 20, "sun397": 397, "cars": 196,
    "fgvc_aircraft": 100, "stl10": 10, "renderedsst2": 2, "cifar10": 10, "cifar100": 100,
    "dsprites_label_orientation": 40, "dsprites_label_x_position": 32, "dtd": 47, "resisc45": 45,
    "smallnorb_label_azimuth": 18, "smallnorb_label_elevation": 9,
}  # fmt: skip
NUMBERED = ("dsprites", "smallnorb")  # whose class names are numbers
RETRIEVAL = ("flickr30k", "mscoco_captions")
WORDS = ("red", "green", "blue", "small", "large", "old", "new", "round", "metal", "striped")
THINGS = ("dog", "car", "boat", "tree", "house", "river", "bird", "lamp", "chair", "plane")


def names_of_38() -> list[str]:
    from clip_benchmark.datasets.builder import dataset_collection

    found = [*dataset_collection["vtab+"], *RETRIEVAL]
    assert len(set(found)) == 38
    return found


class Made:
    """A data set as CLIP_benchmark's converter takes it: files of images, and their targets."""

    def __init__(self, name: str, folder: Path, count: int, side: int = 110):
        from clip_benchmark.datasets import builder

        data = Path(builder.__file__).parent
        lists = json.loads((data / "en_classnames.json").read_text())
        templates = json.loads((data / "en_zeroshot_classification_templates.json").read_text())
        short = name.removeprefix("vtab/")
        self.rng = np.random.default_rng(zlib.crc32(name.encode()))
        self.multilabel = name.endswith("multilabel")
        self.retrieval = name in RETRIEVAL
        if not self.retrieval:
            key = "caltech101_vtab" if name == "vtab/caltech101" else short
            self.classes = lists.get(key) or self._classes(name, lists["imagenet1k"])
            if not self.classes:
                self.classes = [
                    str(i) if short.startswith(NUMBERED) else self._words(3, i)
                    for i in range(COUNTS[short])
                ]
            self.templates = templates.get(short) or templates["imagenet1k"]
            if len(self.classes) > 300:  # a thousand classes in 80 templates take a while
                self.templates = self.templates[:7]
        self.files = [image_file(folder, i, self.rng, side) for i in range(count)]
        self.targets = [self._target() for _ in range(count)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int):
        return str(self.files[i]), self.targets[i]

    def _classes(self, name: str, imagenet: list[str]) -> list[str]:
        from vlm.data.known_classes import known_classes

        if not name.startswith("imagenet"):
            return []
        if name in ("imagenet-a", "imagenet-r"):  # the test of the lists holds them to the package
            found = known_classes(name)
            assert found is not None
            return list(found.names)
        return imagenet

    def _words(self, count: int, *more: int) -> str:
        output = [str(self.rng.choice(WORDS)) for _ in range(count)]
        return " ".join([*output, str(self.rng.choice(THINGS)), *(f"number {n}" for n in more)])

    def _target(self):
        import torch

        if self.retrieval:
            return [f"a {self._words(4)} and a {self._words(3)}." for _ in range(5)]
        if self.multilabel:
            shown = self.rng.random(len(self.classes)) < 0.2
            shown[self.rng.integers(len(shown))] = True
            return torch.tensor(shown.astype(np.int64))
        return int(self.rng.integers(len(self.classes)))


def image_file(folder: Path, number: int, rng: np.random.Generator, side: int) -> Path:
    """One picture; every second is of a kind that Pillow's `convert("RGB")` takes plainly."""
    height, width = rng.integers(side // 3, side, 2)
    y, x = np.mgrid[:height, :width]
    waves = np.sin(np.stack([x / rng.uniform(3, 20), y / rng.uniform(3, 20), (x + y) / 9], -1))
    pixels = 128 + 90 * waves + rng.normal(0, 25, (height, width, 3)) + rng.uniform(-60, 60, 3)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    alpha = Image.fromarray((255 * (y > x)).astype(np.uint8))
    kind, ending, options = number % 12, "jpg", {}
    if kind == 1:
        exif = Image.Exif()
        exif[0x0112] = int(rng.integers(2, 9))
        options = {"exif": exif}
    elif kind == 3:
        image = image.convert("CMYK")
    elif kind == 5:
        image, ending = image.quantize(12), "png"
        options = {"transparency": 2}
    elif kind == 7:
        image.putalpha(alpha)
        ending = "png"
    elif kind == 9:
        image.putalpha(alpha)
        ending, options = "webp", {"lossless": True}
    elif kind == 11:
        # Pillow clips them at 255: brighter ones would all be white, and so tie.
        deep = (pixels.mean(-1).clip(0, 255) * 2).astype(np.uint16)
        image, ending = Image.fromarray(deep), "png"
    elif kind == 4:
        image = image.convert("L")
    elif kind == 8:
        ending = "webp"
    file = folder / f"{number:03d}.{ending}"
    image.save(file, **options)
    return file


def write(
    name: str,
    folder: Path,
    count: int = 50,
    shards: int = 2,
    side: int = 110,
    choose: Callable[[Made], list[int]] | None = None,
) -> Path:
    """The data set in CLIP_benchmark's layout below `folder`, by its converter.

    `choose` gives the classes of the images, where each has one; by default they are random.
    """
    import torch.utils.data
    from clip_benchmark import webdataset_builder as theirs

    root = folder / f"wds_{name.replace('/', '-')}"
    (root / "images").mkdir(parents=True)
    made = Made(name, root / "images", count, side)
    if choose is not None and not made.retrieval and not made.multilabel:
        made.targets = choose(made)
    loader = torch.utils.data.DataLoader

    def here(*args, num_workers: int, **options):  # without eight processes for a few images
        return loader(*args, **options)

    options = {"transform": theirs.path_to_bytes, "max_count": -(-count // shards)}
    with mock.patch.object(torch.utils.data, "DataLoader", here):
        if made.retrieval:
            theirs.convert_retrieval_dataset(made, "test", str(root), verbose=False, **options)
        else:
            more = {"multilabel": made.multilabel, "verbose": False}
            theirs.convert_dataset(made, "test", str(root), **options, **more)
    for file in made.files:
        file.unlink()
    (root / "images").rmdir()
    return root
