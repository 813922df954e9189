"""Faithfulness of explanations by deletion and insertion, against random maps and Grad-CAM.

    KIND=mean vlm train tests/explanation/towers.py --run-dir runs/mean
    for KIND in class map query rotary resnet convnext fastvit vitamin; do
        KIND=$KIND TEXT=runs/mean vlm train tests/explanation/towers.py --run-dir runs/$KIND
    done
    python tests/explanation/curves.py runs/*

For each model: the areas under the curves over 80 evaluation images. The correct text is the
image's own caption, among the captions of all. Low deletion and high insertion are better.
"by" is the mean advantage of `vlm.explain` over another map, with its 95% interval; it is
significant if the interval is above 0. A plain ViT with a map pool is also measured as a NaFlex
tower with the same weights. With --all, all methods are measured.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np

import vlm
from vlm.bundle import Bundle
from vlm.data.sources import first_captions, open_source
from vlm.evaluation.intervals import mean
from vlm.explanation.curves import Faithfulness, faithfulness
from vlm.explanation.geometry import grid, on_pixels
from vlm.explanation.methods import METHODS, relevance_maps
from vlm.inputs.opening import open_image
from vlm.inputs.preprocess import Preprocess
from vlm.models.dual_encoder import DualEncoder

DEFAULT = "path"  # default method of `vlm.explain`
IMAGES = 80


def measure(model: Bundle, images: list, captions: list[str], methods) -> dict[str, Faithfulness]:
    """Measure every method, and random maps, on images with their captions."""
    texts = list(dict.fromkeys(captions))
    z_texts = model.encode_text(texts)
    right = np.array([texts.index(caption) for caption in captions])
    pixels = [model.preprocess.pixels(image) for image in images]
    grids = [grid(model.config.vision, model.preprocess, image.size) for image in images]
    rng = np.random.default_rng(0)
    maps = {"random": [rng.random(shape) for shape in grids]}
    batch = model.preprocess.normalize(model.preprocess.collate(pixels))
    for method in methods:
        if method == "attention" and model.config.vision.kind in ("convnext", "fastvit"):
            continue
        found, _ = relevance_maps(model.model, batch, z_texts[right], method)
        maps[method] = [
            places[: rows * columns].reshape(rows, columns)
            for places, (rows, columns) in zip(np.asarray(found), grids, strict=True)
        ]
    return {
        method: faithfulness(
            model,
            pixels,
            [
                on_pixels(np.float32(places), model.config.vision.patch_size, image.shape[:2])
                for places, image in zip(of_images, pixels, strict=True)
            ],
            z_texts,
            right,
        )
        for method, of_images in maps.items()
    }


def as_naflex(model: Bundle) -> Bundle:
    """Convert a ViT with plain patches and a map pool to a NaFlex tower of the same weights."""
    from flax import nnx

    vision = model.config.vision
    side = vision.image_size // vision.patch_size
    vision = dataclasses.replace(vision, max_patches=side**2)
    config = dataclasses.replace(model.config, vision=vision)
    tower = nnx.eval_shape(lambda: DualEncoder(config, rngs=nnx.Rngs(0)))
    graph, _ = nnx.split(tower)
    preprocess = dataclasses.replace(
        model.preprocess.config,
        resize="naflex",
        patch_size=vision.patch_size,
        max_patches=side**2,
    )
    merged = nnx.merge(graph, nnx.state(model.model))
    return Bundle(merged, Preprocess(preprocess), model.tokenizer, f"{model.name} as naflex")


def report(kind: str, areas: dict[str, Faithfulness]) -> bool:
    """Print the rows of one model; return whether `DEFAULT` beats random and Grad-CAM."""
    better = True
    default = areas[DEFAULT]
    for method, area in areas.items():
        line = f"{kind:9} {method:11} {area.deletion.mean():8.3f} {area.insertion.mean():9.3f}"
        if method != DEFAULT:
            gains = area.deletion - default.deletion, default.insertion - area.insertion
            for gain in gains:
                by = mean(gain)
                line += f"   {by.value:+.3f} ({by.low:+.3f} to {by.high:+.3f})"
                better &= by.low > 0 or method not in ("random", "gradcam")
        print(line, flush=True)
    return better


def main(runs: list[str]) -> int:
    print(f"{'tower':9} {'map':11} deletion insertion   deletion by               insertion by")
    worse = []
    methods = METHODS if "--all" in runs else (DEFAULT, "gradcam")
    for run in [run for run in runs if run != "--all"]:
        model = vlm.load(run)
        data = vlm.load_config(Path(run) / "config.json").data
        held_out = open_source(data, data.eval_split)
        chosen = np.linspace(0, len(held_out) - 1, min(IMAGES, len(held_out))).astype(int)
        images = [open_image(held_out[int(i)][data.image]) for i in chosen]
        captions = [first_captions(held_out, data)[i] for i in chosen]
        kinds = {Path(run).name: model}
        vision = model.config.vision
        if vision.kind == "vit" and vision.pool == "map" and vision.stem == "linear":
            kinds["naflex"] = as_naflex(model)
        for kind, tower in kinds.items():
            if not report(kind, measure(tower, images, captions, methods)):
                worse.append(kind)
    print(f"{DEFAULT} is the best for all" if not worse else f"not best: {', '.join(worse)}")
    return len(worse)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
