"""Measure how many re-encoded and resized copies `vlm.data.duplicates` finds, and what else.

    python tests/data/copies.py [--images 1500]

Of OpenMoji's drawings and, where scikit-learn is installed, of handwritten digits and of crops of
two photographs. Prints the share of copies that share a group with their original, and the images
that share one with another image of the set (some drawings are copies of each other in truth).
"""

import argparse
import io

import numpy as np
from PIL import Image

from vlm.config import DataConfig
from vlm.data.dataset_stats import duplicate_key
from vlm.data.duplicates import copy_groups, thumbnails
from vlm.data.sources import open_source

COPIES = {
    "JPEG 95": (95, 1.0, "JPEG"),
    "JPEG 75": (75, 1.0, "JPEG"),
    "JPEG 50": (50, 1.0, "JPEG"),
    "JPEG 75, half size": (75, 0.5, "JPEG"),
    "JPEG 90, double size": (90, 2.0, "JPEG"),
    "WebP 80": (80, 1.0, "WEBP"),
}


def copy(image: Image.Image, quality: int, scale: float, form: str) -> Image.Image:
    size = (max(8, round(image.width * scale)), max(8, round(image.height * scale)))
    out = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(out, form, quality=quality)
    return Image.open(out).convert("RGB")


def sets(count: int, rng: np.random.Generator):
    source = open_source(DataConfig(source="openmoji"), "train")
    at = rng.choice(len(source), min(count, len(source)), replace=False)
    drawings = [source[int(i)]["image"] for i in at]
    yield (
        "OpenMoji",
        [
            Image.open(io.BytesIO(x)).convert("RGB") if isinstance(x, bytes) else Image.fromarray(x)
            for x in drawings
        ],
    )
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError:
        return
    pixels = (load_digits().images * 255 / 16).astype(np.uint8)[:1000]
    digits = [Image.fromarray(p).resize((64, 64), Image.Resampling.BICUBIC) for p in pixels]
    yield "digits", [digit.convert("RGB") for digit in digits]
    crops = []
    for photo in map(Image.fromarray, load_sample_images().images):
        for side in rng.integers(64, 200, 250).tolist():
            x, y = rng.integers(0, photo.width - side), rng.integers(0, photo.height - side)
            crops.append(photo.crop((x, y, x + side, y + side)))
    yield "crops", crops


def found(images: list[Image.Image], copies: list[Image.Image]) -> float:
    groups = copy_groups(np.concatenate([thumbnails(images), thumbnails(copies)]))
    return float((groups[: len(images)] == groups[len(images) :]).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1500)
    given = parser.parse_args()
    for name, images in sets(given.images, np.random.default_rng(0)):
        groups = np.bincount(copy_groups(thumbnails(images)))
        print(f"{name}: {len(images):,} images")
        print(
            f"  {groups[groups > 1].sum():5,}  share a group with another; largest {groups.max()}"
        )
        for kind, how in COPIES.items():
            copies = [copy(image, *how) for image in images]
            same = np.mean(
                [duplicate_key(a) == duplicate_key(b) for a, b in zip(images, copies, strict=True)]
            )
            print(f"  {found(images, copies):6.1%}  of copies found: {kind} (by hash {same:.1%})")
