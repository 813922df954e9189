"""Do explanations tell the truth? Deletion and insertion curves, beside random maps and Grad-CAM.

    KIND=mean vlm train tests/explain/towers.py --run-dir runs/mean
    for KIND in class map query rotary resnet convnext fastvit vitamin; do
        KIND=$KIND TEXT=runs/mean vlm train tests/explain/towers.py --run-dir runs/$KIND
    done
    python tests/explain/curves.py runs/*

Of each model: the area under the curves over 80 of its held-out images, where the text is the
image's own caption among theirs. Small deletion and large insertion are good.
"by" says how much better `vlm.explain` is than another map, image by image, with its
95% interval; it is won where the interval is above 0. A plain ViT with a map pool is measured a
second time as a NaFlex tower, which it is too. With --all, the other methods are measured as well.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np

import vlm
from vlm.bundle import Bundle
from vlm.data.sources import first_captions, open_source
from vlm.evaluate.intervals import mean
from vlm.explain.curves import Faithfulness, faithfulness
from vlm.explain.geometry import grid, on_pixels
from vlm.explain.methods import METHODS, place_maps
from vlm.inputs.opening import open_image
from vlm.inputs.preprocess import Preprocess
from vlm.models.dual_encoder import DualEncoder

OURS = "path"  # what `vlm.explain` takes
IMAGES = 80


def measure(model: Bundle, images: list, captions: list[str], methods) -> dict[str, Faithfulness]:
    """The areas of every method, and of random maps, over images with their captions."""
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
        found, _ = place_maps(model.model, batch, z_texts[right], method)
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
    """A ViT of plain patches and a map pool, as a NaFlex tower of the same weights."""
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
    made = nnx.merge(graph, nnx.state(model.model))
    return Bundle(made, Preprocess(preprocess), model.tokenizer, f"{model.name} as naflex")


def report(kind: str, areas: dict[str, Faithfulness]) -> bool:
    """Print the rows of one model; whether ours is better than random and Grad-CAM in both."""
    won = True
    ours = areas[OURS]
    for method, area in areas.items():
        line = f"{kind:9} {method:11} {area.deletion.mean():8.3f} {area.insertion.mean():9.3f}"
        if method != OURS:
            for gain in (area.deletion - ours.deletion, ours.insertion - area.insertion):
                by = mean(gain)
                line += f"   {by.value:+.3f} ({by.low:+.3f} to {by.high:+.3f})"
                won &= by.low > 0 or method not in ("random", "gradcam")
        print(line, flush=True)
    return won


def main(runs: list[str]) -> int:
    print(f"{'tower':9} {'map':11} deletion insertion   deletion by               insertion by")
    lost = []
    methods = METHODS if "--all" in runs else (OURS, "gradcam")
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
                lost.append(kind)
    print(f"{OURS} is the best for all" if not lost else f"lost: {', '.join(lost)}")
    return len(lost)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
