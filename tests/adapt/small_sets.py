"""`vlm adapt` on two small sets of real images that come with scikit-learn.

    python tests/adapt/small_sets.py MODEL [--shots 16] [--budget 120]

The handwritten digits of UCI, 8 x 8 pixels each, named as keycaps; and tiles of two photographs,
a palace roof and a flower, those to learn from cut from other parts than those to measure on.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

TILE = 48  # pixels


def digits():
    """(to learn from, to measure on): half of the digits each."""
    from sklearn.datasets import load_digits

    held = load_digits()
    pixels = (255 - held.images * 255 / 16).astype(np.uint8)
    images = [Image.fromarray(p).resize((64, 64), Image.Resampling.BICUBIC) for p in pixels]
    names = tuple(f"keycap: {number}" for number in range(10))
    order = np.random.default_rng(0).permutation(len(images))
    whole = _labelled(images, held.target, names, "digits")
    return whole.take(order[::2]), whole.take(order[1::2])


def tiles():
    """(to learn from, to measure on): tiles of the left and the right half of each photograph."""
    from sklearn.datasets import load_sample_images

    held = load_sample_images()
    names = ("castle", "flower")
    parts = []
    for side in (0, 1):
        images, target = [], []
        for number, photo in enumerate(held.images):
            rows, columns = photo.shape[0] // TILE, photo.shape[1] // TILE // 2
            for y in range(rows):
                for x in range(columns):
                    at = (x + side * columns) * TILE
                    images.append(Image.fromarray(photo[y * TILE : (y + 1) * TILE, at : at + TILE]))
                    target.append(number)
        parts.append(_labelled(images, np.array(target), names, "tiles of two photographs"))
    return tuple(parts)


def _labelled(images, target, names, what):
    from vlm.adapt import Labelled
    from vlm.evaluate.tasks import DataInfo

    return Labelled(images, np.asarray(target, np.int64), names, DataInfo(what))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--budget", type=float, default=120)
    parser.add_argument("--template", default="{}")
    parser.add_argument("--methods", nargs="*", default=[])
    options = parser.parse_args()
    from rich.console import Console

    from vlm.adapt import adapt
    from vlm.adapt.labelled import pick_shots
    from vlm.bundle import load

    model = load(options.model)
    for name, (learn, test) in (("digits", digits()), ("tiles", tiles())):
        learn = learn.take(pick_shots(learn, options.shots))
        with tempfile.TemporaryDirectory() as work:
            made = adapt(
                model, learn, Path(work), options.budget,
                options.methods, [options.template], test,
            )  # fmt: skip
        print(f"{name}, {options.shots} of each class: {made.chosen}")
        Console(width=160).print(made)


if __name__ == "__main__":
    main()
