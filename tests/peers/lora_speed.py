"""A step of LoRA on a ViT-B/32 pair beside `peft` and `transformers` on a CPU, batch 32, rank 8.

    pip install -e ".[peers]"
    python tests/peers/lora_speed.py

Both models have random weights and the same sizes, adapters on the same layers, the same loss and
AdamW, and compute in float32; ours is the step of `vlm train`. Prints pairs per second, medians
over rounds taken in turn, and the ratio.
"""

import argparse
import itertools

import numpy as np
from turns import Peer, answer, compare, requests, time_of
from vit_b32 import model_config

BATCH, RANK, REPEATS = 32, 8, 3


def inputs():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCH, 224, 224, 3), np.uint8)
    tokens = rng.integers(1, 49_000, (BATCH, 77), np.int32)
    tokens[:, -1] = 49_407
    return images, tokens


def ours(remat: str) -> None:
    import jax
    import jax.numpy as jnp

    from vlm import config as c
    from vlm.sharding import global_batch, make_mesh
    from vlm.training.step import Trainer

    experiment = c.Experiment(
        model=model_config(),
        preprocess=c.PreprocessConfig(image_size=224),
        tokenizer=c.TokenizerConfig(context_length=77),
        optimizer=c.OptimizerConfig(learning_rate=1e-4, clip_norm=None),
        adapter=c.AdapterConfig(rank=RANK),
        batch_size=BATCH,
        remat=remat,
        scan=False,
    )
    trainer = Trainer(experiment, make_mesh(experiment.mesh, jax.devices()[:1]))
    images, tokens = inputs()
    batch = global_batch({"images": images, "tokens": tokens}, trainer.mesh)
    state = trainer.init(jnp.int32(10_000))

    def train():
        nonlocal state
        state, metrics = trainer.step(state, batch)
        jax.block_until_ready(metrics)

    serve(train)


def theirs() -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPConfig, CLIPModel

    layers = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    model = CLIPModel(CLIPConfig())
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules=layers))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    images, tokens = inputs()
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    tokens = torch.from_numpy(tokens).long()

    def train():
        images = pixels.float().div(127.5).sub(1)
        optimizer.zero_grad()
        model(input_ids=tokens, pixel_values=images, return_loss=True).loss.backward()
        optimizer.step()

    serve(train)


def serve(train) -> None:
    for _ in requests():
        train()  # takes the memory back that the other side had in its turn
        seconds = sum(time_of(step) for step in itertools.repeat(train, REPEATS))
        answer(REPEATS * BATCH / seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--as", dest="name", choices=("ours", "theirs"))
    args = parser.parse_args()
    if args.name == "ours":
        return ours(args.remat)
    if args.name == "theirs":
        return theirs()
    options = ("--remat", args.remat)
    peers = [Peer(__file__, name, *options) for name in ("ours", "theirs")]
    return compare(peers, ["train"], args.rounds)


if __name__ == "__main__":
    main()
