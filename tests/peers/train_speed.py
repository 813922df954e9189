"""Training speed, end to end, beside open_clip: the same model, data and batch in one run.

    pip install -e ".[demo,peers]"
    python tests/peers/train_speed.py [--model b32]

The model is the ViT of `openmoji_plain.py`, or ViT-B/32 at 224 pixels. Two processes train in turn,
a few steps each, so that both meet the same machine: ours as `vlm train` runs it, theirs with
open_clip's model, loss, transforms and a PyTorch data loader. The times include reading,
augmentation and the update. Prints pairs per second and CPU seconds (of all threads and workers)
per 1,000 pairs of every round, and the ratios of the medians. On a machine that does other work,
CPU time says more with `--threads 1`, since PyTorch's threads spin where they wait.
"""

import argparse
import dataclasses
import os
import statistics
import time

from openmoji_plain import config as plain
from turns import Peer, answer, requests
from vit_b32 import model_config

from vlm import config as c

TEXTS = 2048  # vocabulary of the tokenizer
AUGMENT = plain.data.augment
b32 = dataclasses.replace(
    plain,
    model=model_config("gelu", end_id=1),
    preprocess=c.PreprocessConfig(image_size=224),
    tokenizer=c.TokenizerConfig(context_length=77),
    batch_size=32,
)
MODELS = {"plain": plain, "b32": b32}


def ours(config: c.Experiment) -> None:
    import jax
    import jax.numpy as jnp

    from vlm.data.pipeline import train_batches
    from vlm.data.sources import vocabulary_texts
    from vlm.inputs.tokenizer import train_bpe
    from vlm.sharding import global_batch, make_mesh
    from vlm.training.step import Trainer

    mesh = make_mesh(config.mesh)
    trainer = Trainer(config, mesh)
    batch_size = config.batch_size
    tokenizer = train_bpe(vocabulary_texts(config.data), TEXTS, config.tokenizer.context_length)
    batches = train_batches(
        config.data, trainer.preprocess, tokenizer, batch_size=batch_size, seed=0
    )
    state = trainer.init(jnp.int32(1000))
    wait = 0.0
    for steps in map(int, requests()):
        began, wait = time.perf_counter(), 0.0
        for _ in range(steps):
            asked = time.perf_counter()
            batch = global_batch(next(batches), mesh)
            wait += time.perf_counter() - asked
            state, metrics = trainer.step(state, batch)
        jax.block_until_ready(metrics)
        took(steps * config.batch_size, began, wait)


def theirs(config: c.Experiment, workers: int, threads: int | None) -> None:
    import numpy as np
    import torch
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP
    from open_clip.transform import AugmentationCfg, image_transform
    from PIL import Image

    from vlm.data.sources import CachedSource, open_source, vocabulary_texts
    from vlm.inputs.preprocess import Preprocess
    from vlm.inputs.tokenizer import train_bpe

    if threads is not None:
        torch.set_num_threads(threads)
    vision, text = config.model.vision, config.model.text
    assert isinstance(vision, c.ViTConfig)
    assert isinstance(text, c.TextConfig)
    source = CachedSource(
        open_source(config.data, "train"), config.data, Preprocess(config.preprocess)
    )
    rows = [source[i] for i in range(len(source))]
    images = [Image.fromarray(np.asarray(row["image"])) for row in rows]
    tokenizer = train_bpe(vocabulary_texts(config.data), TEXTS, text.context_length)
    tokens = torch.from_numpy(tokenizer([row["caption"] for row in rows])).long()
    augment = AugmentationCfg(
        scale=AUGMENT.crop, color_jitter=(AUGMENT.jitter,) * 3 + (0.0,), color_jitter_prob=1.0
    )
    transform = image_transform(vision.image_size, is_train=True, aug_cfg=augment)

    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, i):
            return transform(images[i]), tokens[i]

    model = CLIP(
        config.model.embed_dim,
        {
            "width": vision.width,
            "layers": vision.depth,
            "head_width": vision.width // vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": text.heads,
            "layers": text.depth,
        },
        output_dict=True,
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optimizer.learning_rate, betas=(0.9, 0.98), eps=1e-6
    )
    loss_of = ClipLoss()

    def forever():
        while True:
            yield from torch.utils.data.DataLoader(
                Pairs(), config.batch_size, shuffle=True, drop_last=True, num_workers=workers
            )

    batches = forever()
    for steps in map(int, requests()):
        began, wait = time.perf_counter(), 0.0
        for _ in range(steps):
            asked = time.perf_counter()
            pixels, ids = next(batches)
            wait += time.perf_counter() - asked
            out = model(pixels, ids)
            loss = loss_of(out["image_features"], out["text_features"], out["logit_scale"])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, 4.6052)
        took(steps * config.batch_size, began, wait)


def took(pairs: int, began: float, wait: float) -> None:
    seconds = time.perf_counter() - began
    answer(pairs / seconds, wait / seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="plain")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4, help="of a round")
    parser.add_argument("--workers", type=int, default=1, help="of open_clip's data loader")
    parser.add_argument("--threads", type=int, help="of the products, on as many CPU cores")
    parser.add_argument("--as", dest="name", choices=("ours", "theirs"))
    args = parser.parse_args()
    config = MODELS[args.model]
    if args.threads is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    if args.name == "ours":
        return ours(config)
    if args.name == "theirs":
        return theirs(config, args.workers, args.threads)

    options = ["--model", args.model, "--workers", str(args.workers)]
    options += [] if args.threads is None else ["--threads", str(args.threads)]
    peers = {name: Peer(__file__, name, *options) for name in ("ours", "theirs")}
    for peer in peers.values():
        peer.take("2")  # compile and fill the queues
    speeds = {name: [] for name in peers}
    costs = {name: [] for name in peers}
    thousands = args.steps * config.batch_size / 1000
    for number in range(args.rounds):
        for name, peer in peers.items():
            peer.take("1")  # a stopped process lost its idle pages: it gets them back untimed
            before = peer.cpu_seconds()
            speed, wait = peer.take(str(args.steps))
            speeds[name].append(speed)
            costs[name].append((peer.cpu_seconds() - before) / thousands)
            print(
                f"round {number}  {name:7} {speed:6.1f} pairs/s  {costs[name][-1]:6.1f} CPU seconds"
                f"  waiting for data {wait:.1%}",
                flush=True,
            )
    speed = {name: statistics.median(values) for name, values in speeds.items()}
    cost = {name: statistics.median(values) for name, values in costs.items()}
    print(
        f"vlm {speed['ours']:.1f} pairs/s, open_clip {speed['theirs']:.1f} pairs/s: "
        f"{speed['ours'] / speed['theirs']:.2f}x\n"
        f"vlm {cost['ours']:.1f} CPU seconds per 1,000 pairs, open_clip {cost['theirs']:.1f}: "
        f"{cost['theirs'] / cost['ours']:.2f}x"
    )
    return None


if __name__ == "__main__":
    main()
