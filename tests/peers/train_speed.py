"""Training speed, end to end, beside open_clip: the same model, data and batch in one run.

    pip install -e ".[demo,peers]"
    python tests/peers/train_speed.py

Two processes train in turn, a few steps each, so that both meet the same machine: ours as
`vlm train` runs it, theirs with open_clip's model, loss, transforms and a PyTorch data loader. The
times include reading, augmentation and the update. Prints the pairs per second of every round and
the ratio of the medians.
"""

import argparse
import statistics
import time

from openmoji_plain import config
from turns import Peer, answer, requests

STEPS, BATCH = 4, config.batch_size
TEXT, AUGMENT = config.model.text, config.data.augment


def ours() -> None:
    import jax
    import jax.numpy as jnp

    from vlm.data.pipeline import train_batches
    from vlm.data.sources import vocabulary_texts
    from vlm.inputs.tokenizer import train_bpe
    from vlm.sharding import global_batch, make_mesh
    from vlm.training.step import Trainer

    mesh = make_mesh(config.mesh)
    trainer = Trainer(config, mesh)
    tokenizer = train_bpe(vocabulary_texts(config.data), TEXT.vocab_size, TEXT.context_length)
    batches = train_batches(config.data, trainer.preprocess, tokenizer, batch_size=BATCH, seed=0)
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
        took(steps, began, wait)


def theirs(workers: int) -> None:
    import numpy as np
    import torch
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP
    from open_clip.transform import AugmentationCfg, image_transform
    from PIL import Image

    from vlm.data.sources import CachedSource, open_source, vocabulary_texts
    from vlm.inputs.preprocess import Preprocess
    from vlm.inputs.tokenizer import train_bpe

    source = CachedSource(
        open_source(config.data, "train"), config.data, Preprocess(config.preprocess)
    )
    rows = [source[i] for i in range(len(source))]
    images = [Image.fromarray(np.asarray(row["image"])) for row in rows]
    tokenizer = train_bpe(vocabulary_texts(config.data), TEXT.vocab_size, TEXT.context_length)
    tokens = torch.from_numpy(tokenizer([row["caption"] for row in rows])).long()
    augment = AugmentationCfg(
        scale=AUGMENT.crop, color_jitter=(AUGMENT.jitter,) * 3 + (0.0,), color_jitter_prob=1.0
    )
    transform = image_transform(64, is_train=True, aug_cfg=augment)

    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, i):
            return transform(images[i]), tokens[i]

    tower = {"width": 192, "layers": 6, "head_width": 48, "image_size": 64, "patch_size": 8}
    text = {"context_length": TEXT.context_length, "vocab_size": TEXT.vocab_size}
    model = CLIP(192, tower, {**text, "width": 192, "heads": 4, "layers": 4}, output_dict=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optimizer.learning_rate, betas=(0.9, 0.98), eps=1e-6
    )
    loss_of = ClipLoss()

    def forever():
        while True:
            yield from torch.utils.data.DataLoader(
                Pairs(), BATCH, shuffle=True, drop_last=True, num_workers=workers
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
        took(steps, began, wait)


def took(steps: int, began: float, wait: float) -> None:
    seconds = time.perf_counter() - began
    answer(steps * BATCH / seconds, wait / seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--workers", type=int, default=1, help="of open_clip's data loader")
    parser.add_argument("--as", dest="name", choices=("ours", "theirs"))
    args = parser.parse_args()
    if args.name == "ours":
        return ours()
    if args.name == "theirs":
        return theirs(args.workers)

    peers = {
        name: Peer(__file__, name, "--workers", str(args.workers)) for name in ("ours", "theirs")
    }
    for peer in peers.values():
        peer.take("2")  # compile and fill the queues
    speeds = {name: [] for name in peers}
    for number in range(args.rounds):
        for name, peer in peers.items():
            speed, wait = peer.take(str(STEPS))
            speeds[name].append(speed)
            print(f"round {number}  {name:7} {speed:6.1f} pairs/s  waiting for data {wait:.1%}")
    middle = {name: statistics.median(values) for name, values in speeds.items()}
    print(
        f"vlm {middle['ours']:.1f} pairs/s, open_clip {middle['theirs']:.1f} pairs/s: "
        f"{middle['ours'] / middle['theirs']:.2f}x"
    )
    return None


if __name__ == "__main__":
    main()
