"""`vlm adapt` on two small sets of real images that come with scikit-learn.

    python tests/adaptation/small_sets.py [--model RUN] [--shots 16]

The handwritten digits of UCI, 8 x 8 pixels each, named as keycaps; and tiles of two photographs,
a palace roof and a flower, those to learn from cut from other parts than those to measure on.
Prints the tables of `vlm adapt`, whose column `test` is of images that no method saw. The budget is
ample, so that every run of training takes all its steps on any machine.
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
    from vlm.adaptation import Labelled
    from vlm.evaluation.tasks import DataInfo

    return Labelled(images, np.asarray(target, np.int64), names, DataInfo(what))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a run on OpenMoji; by default one of six epochs is made")
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--budget", type=float, default=7200)
    parser.add_argument("--template", default="{}")
    parser.add_argument("--methods", nargs="*", default=[])
    options = parser.parse_args()
    from restyled import trained
    from rich.console import Console

    from vlm.adaptation import adapt
    from vlm.adaptation.labelled import pick_shots
    from vlm.bundle import load

    with tempfile.TemporaryDirectory() as held:
        folder = Path(held)
        model = load(options.model or trained(folder))
        for name, (learn, test) in (("digits", digits()), ("tiles", tiles())):
            learn = learn.take(pick_shots(learn, options.shots))
            made = adapt(
                model, learn, folder / name, options.budget,
                options.methods, [options.template], test,
            )  # fmt: skip
            print(f"{name}, {options.shots} of each class, {len(test)} to measure on:", flush=True)
            Console(width=160).print(made)


if __name__ == "__main__":
    main()
