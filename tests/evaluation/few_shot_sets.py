"""Every few-shot head against zero-shot on three sets of images that can be had without a download.

    python tests/evaluation/few_shot_sets.py MODEL [--rounds 5]

The groups of OpenMoji (what the name of an emoji says before its colon, where at least 24 drawings
share it), scikit-learn's digits, named as keycaps, and tiles of its two photographs. A run of
`vlm train openmoji` has seen the drawings, with their names: there zero-shot is hard to beat. The
last line says whether a head that starts from zero-shot falls below it by more than its interval.
"""

import argparse
import collections
import importlib.util
from pathlib import Path

import numpy as np

from vlm.config import DataConfig
from vlm.data.sources import open_source
from vlm.evaluation.few_shot_curve import SHOTS, accuracy_by_shots
from vlm.heads.few_shot import FROM_ZERO_SHOT, METHODS
from vlm.heads.prompts import class_embeddings

LEAST = 24  # drawings of a group


def openmoji_groups():
    """(images, target, names)."""
    images, groups = [], []
    for split in ("train", "validation", "test"):
        source = open_source(DataConfig(source="openmoji", train_split=split), split)
        for i in range(len(source)):
            example = source[i]
            name, colon, _ = example["caption"].partition(":")
            if colon:
                images.append(example["image"])
                groups.append(name)
    counts = collections.Counter(groups)
    names = sorted(name for name, count in counts.items() if count >= LEAST)
    kept = [i for i, name in enumerate(groups) if name in names]
    return [images[i] for i in kept], np.array([names.index(groups[i]) for i in kept]), names


def scikit_learn_sets():
    """(what, images, target, names) of the digits and of the tiles."""
    path = Path(__file__).parent.parent / "adapt" / "small_sets.py"
    spec = importlib.util.spec_from_file_location("small_sets", path)
    small_sets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small_sets)
    for what, parts in (("digits", small_sets.digits()), ("tiles", small_sets.tiles())):
        images = [image for part in parts for image in part.images]
        yield what, images, np.concatenate([part.target for part in parts]), parts[0].names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    from vlm.bundle import load

    model = load(options.model)
    below = []
    sets = [("OpenMoji groups", *openmoji_groups()), *scikit_learn_sets()]
    for what, images, target, names in sets:
        z = np.asarray(model.encode_image(images), np.float32)
        scale = model.logit_scale
        prior = scale * class_embeddings(model, names, ("{}",)).T
        curve = accuracy_by_shots(z, target, prior, scale, METHODS, SHOTS, options.rounds)
        zero = curve.zero_shot
        print(f"{what}: {len(images):,} images, {len(names)} classes, zero-shot {zero}")
        print(f"  {'shots':12}", *(f"{k:>7}" for k in SHOTS))
        for method, points in curve.points.items():
            print(f"  {method:12}", *(f"{points[k].value:>7.1%}" for k in SHOTS), flush=True)
            # The images are the same, so the interval of either is a cautious one.
            below += [
                f"{what}, {method}, {k} shots"
                for k in SHOTS
                if method in FROM_ZERO_SHOT and points[k].high < zero.value
            ]
    print("below zero-shot by more than the interval:", "; ".join(below) or "none")


if __name__ == "__main__":
    main()
