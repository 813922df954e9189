"""Steps that online selection saves on OpenMoji with 30% of the captions shuffled.

    python tests/training/selection_speed.py                     # 5 seeds on `test`
    python tests/training/selection_speed.py --split validation --seeds 2   # to tune

Bar: with at most 0.6 of the steps, selection reaches the accuracy of uniform sampling, and the 95%
interval of the difference over the seeds excludes a loss. A tiny model on 32-pixel drawings is
trained from scratch by the steps of `vlm train`: uniformly on shuffled captions, and with
selection from super-batches of the same captions. The reference is the same model, trained on a
part of the training data with the right captions (`--curated`), as JEST's on a curated set.
Accuracy is top-1 among the captions of all splits. Seeds differ in parameters, data order and the
shuffled captions. It takes about 12 minutes of CPU time.
"""

import argparse
import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from vlm.config import (
    DataConfig,
    Experiment,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PreprocessConfig,
    SelectionConfig,
    TextConfig,
    TokenizerConfig,
    ViTConfig,
)
from vlm.data.sources import first_captions, open_source
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import train_bpe
from vlm.sharding import make_mesh
from vlm.training.step import Trainer
from vlm.training.teacher import StoredTeacher

SIZE, WIDTH, LENGTH = 32, 96, 20
T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 8: 2.365, 10: 2.262}  # by seeds, 97.5%

BASE = Experiment(
    model=ModelConfig(
        vision=ViTConfig(
            image_size=SIZE, patch_size=8, stem="conv", stem_widths=(16, 32, 64), width=WIDTH,
            depth=2, heads=4, mlp_dim=2 * WIDTH, pool="mean", projection="linear",
            activation="gelu",
        ),
        text=TextConfig(
            vocab_size=1024, context_length=LENGTH, width=WIDTH, depth=1, heads=4,
            mlp_dim=2 * WIDTH, pool="mean", pad_id=0, projection="linear", activation="gelu",
            dropout=0.1,
        ),
        embed_dim=WIDTH,
    ),
    preprocess=PreprocessConfig(image_size=SIZE, kernel="bilinear"),
    tokenizer=TokenizerConfig(context_length=LENGTH),
    data=DataConfig(source="openmoji"),
    optimizer=OptimizerConfig(name="muon", learning_rate=2e-3, weight_decay=0.5, ema=0.97),
    batch_size=128,
    scan=False,
    remat="none",
)  # fmt: skip


class Reference(StoredTeacher):
    """Embeddings of all training pairs by a model, which `train` puts into the batches."""

    def __init__(self, z_image: np.ndarray, z_text: np.ndarray, log_scale: float):
        self.pairs = {"teacher_image": z_image, "teacher_text": z_text}
        self.own_log_scale, self.log_scale, self.logit_bias = log_scale, 0.0, None
        self.width = z_image.shape[1]


class OpenMoji:
    """Pixels and captions of all splits in memory."""

    def __init__(self):
        self.images, self.texts = {}, {}
        preprocess = Preprocess(BASE.preprocess)
        for split in ("train", "validation", "test"):
            source = open_source(BASE.data, split)
            pixels = preprocess.blank(len(source))
            for row in range(len(source)):
                preprocess.put(pixels, row, preprocess.pixels(source[row]["image"], f"{row}"))
            self.images[split], self.texts[split] = pixels, first_captions(source, BASE.data)
        self.tokenizer = train_bpe(self.texts["train"], 1024, LENGTH)
        self.captions = list(dict.fromkeys(t for texts in self.texts.values() for t in texts))
        self.tokens = self.tokenizer(self.captions)


def accuracy(trainer: Trainer, state, data: OpenMoji, split: str) -> float:
    """Top-1 accuracy of the images of a split among all captions."""
    z_text = np.asarray(trainer.embed_texts(state, data.tokens))
    z_image = np.asarray(trainer.embed_images(state, data.images[split]))
    found = (z_image @ z_text.T).argmax(1)
    return float(
        np.mean([data.captions[i] == t for i, t in zip(found, data.texts[split], strict=True)])
    )


def train(e: Experiment, images, tokens, total: int, reference: Reference | None = None):
    """Train on random batches, an epoch after the other; return trainer, state and seconds."""
    trainer = Trainer(e, make_mesh(MeshConfig(), jax.devices()[:1]), teacher=reference)
    state, random = trainer.init(jnp.int32(total)), np.random.default_rng(e.seed)
    order = np.empty(0, np.int64)
    began = time.process_time()
    for _ in range(total):
        while len(order) < e.super_batch_size:
            order = np.concatenate([order, random.permutation(len(images))])
        rows, order = order[: e.super_batch_size], order[e.super_batch_size :]
        batch = {"images": images[rows], "tokens": tokens[rows]}
        if reference is not None:
            batch |= {name: z[rows] for name, z in reference.pairs.items()}
        state, _ = trainer.step(state, batch)
    jax.block_until_ready(state.step)
    return trainer, state, time.process_time() - began


def shuffled(texts: list[str], share: float, seed: int) -> list[str]:
    """Exchange the captions of a share of the examples among them."""
    random = np.random.default_rng([seed, 1])
    rows = random.permutation(len(texts))[: round(share * len(texts))]
    texts = list(texts)
    for to, value in zip(np.roll(rows, 1), [texts[row] for row in rows], strict=True):
        texts[to] = value
    return texts


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and 95% interval by Student's t."""
    mean, n = float(np.mean(values)), len(values)
    half = T_QUANTILE[n] * float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--part", type=float, default=0.6, help="of the steps, for selection")
    parser.add_argument("--noise", type=float, default=0.3)
    parser.add_argument("--curated", type=float, default=0.5, help="of the data of the reference")
    parser.add_argument("--filter-ratio", type=float, default=0.75)
    parser.add_argument("--score", default="learnability")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--control", action="store_true", help="also uniform with fewer steps")
    options = parser.parse_args()

    data = OpenMoji()
    images, texts = data.images["train"], data.texts["train"]
    clean = np.random.default_rng(0).permutation(len(texts))[: round(options.curated * len(texts))]
    right = data.tokenizer(texts)
    first = dataclasses.replace(BASE, seed=100)
    teacher, taught, _ = train(first, images[clean], right[clean], options.steps)
    found = accuracy(teacher, taught, data, options.split)
    print(f"reference: {len(clean):,} pairs, accuracy {found:.1%}", flush=True)
    z_image = np.asarray(teacher.embed_images(taught, images))
    log_scale = float(taught.params["logit_scale"])

    selection = SelectionConfig(
        options.score, options.filter_ratio, options.chunks, reference="in memory"
    )
    if options.score == "hard_learner":
        selection = dataclasses.replace(selection, reference="")
    few, differences = round(options.part * options.steps), []
    for seed in range(options.seeds):
        noisy = data.tokenizer(shuffled(texts, options.noise, seed))
        reference = Reference(z_image, np.asarray(teacher.embed_texts(taught, noisy)), log_scale)
        plain = dataclasses.replace(BASE, seed=seed)
        chosen = dataclasses.replace(plain, selection=selection)
        runs = {"uniform": (plain, options.steps, None), "selection": (chosen, few, reference)}
        if options.control:
            runs["uniform, fewer steps"] = (plain, few, None)
        found = {}
        for name, (e, steps, stored) in runs.items():
            trainer, state, seconds = train(e, images, noisy, steps, stored)
            found[name] = accuracy(trainer, state, data, options.split)
            took = f"{steps} steps ({seconds:.0f} s of CPU)"
            print(f"seed {seed}: {name} {found[name]:.1%} in {took}", flush=True)
        differences.append(found["selection"] - found["uniform"])
    found = interval(differences)
    print("selection - uniform: {:+.1%} ({:+.1%} to {:+.1%})".format(*found))
    print(f"bar: {'met' if found[1] > 0 else 'missed'} at {options.part:.2f} of the steps")


if __name__ == "__main__":
    main()
