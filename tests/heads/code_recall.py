"""Recall and speed of an index's codes on embeddings of a real run.

    python tests/heads/code_recall.py MODEL [--copies 4] [--k 10]

The rows are OpenMoji's drawings, each also cropped and turned a little (--copies); the queries are
their English names and other crops. Prints, for each coding, recall at k beside exact search,
the memory that is scanned, and queries per second in batches of 100.
"""

import argparse
import io
import time

import numpy as np
from PIL import Image

from vlm.config import DataConfig
from vlm.data.sources import open_source
from vlm.heads.retrieval import RetrievalIndex

QUERIES = 1000  # of texts, and of images


def changed(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The drawing turned by up to 15 degrees and cut to between 75 and 100% of its side."""
    turned = image.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR, fillcolor="white")
    side = round(image.width * rng.uniform(0.75, 1.0))
    x, y = rng.integers(0, image.width - side + 1, 2)
    return turned.crop((x, y, x + side, y + side))


def drawings():
    """(images, names) of all splits."""
    images, names = [], []
    for split in ("train", "validation", "test"):
        source = open_source(DataConfig(source="openmoji", train_split=split), split)
        for i in range(len(source)):
            example = source[i]
            images.append(Image.open(io.BytesIO(example["image"])).convert("RGB"))
            names.append(example["caption"])
    return images, names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--k", type=int, default=10)
    options = parser.parse_args()
    from vlm.bundle import load

    model, rng = load(options.model), np.random.default_rng(0)
    images, names = drawings()
    copies = (changed(image, rng) for _ in range(options.copies) for image in images)
    rows = np.concatenate([model.encode_image(images), model.encode_image(copies)])
    at = rng.permutation(len(images))[:QUERIES]
    asked = {
        "texts": model.encode_text([names[i] for i in at]),
        "images": model.encode_image(changed(images[i], rng) for i in at),
    }
    exact = RetrievalIndex(model)
    exact.add(rows, ids=range(len(rows)))
    print(f"{len(rows):,} rows x {rows.shape[1]}, {len(at):,} queries of each kind, k {options.k}")
    truth = {kind: exact.search(z, k=options.k) for kind, z in asked.items()}
    print(f"exact : {speed(exact, asked['images'], options.k):8,.0f} queries/s")
    for coding in ("int8", "binary"):
        index = RetrievalIndex(model, coding=coding)
        index.add(rows, ids=range(len(rows)))
        held = sum(codes.nbytes for codes in index._items.codes)
        recalls = []
        for kind, z in asked.items():
            pairs = zip(truth[kind], index.search(z, k=options.k), strict=True)
            shares = [len({h.id for h in a} & {h.id for h in b}) / len(a) for a, b in pairs]
            recalls.append(f"{kind} {np.mean(shares):.4f}")
        print(
            f"{coding:6}: {speed(index, asked['images'], options.k):8,.0f} queries/s, "
            f"memory 1/{rows.nbytes / held:.1f}, recall at {options.k}: {', '.join(recalls)}"
        )


def speed(index: RetrievalIndex, z: np.ndarray, k: int) -> float:
    """Queries per second in batches of 100, the best of three rounds."""
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        for start in range(0, len(z), 100):
            index.search(z[start : start + 100], k=k)
        best = min(best, time.perf_counter() - began)
    return len(z) / best


if __name__ == "__main__":
    main()
