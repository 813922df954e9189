"""ViT-B/32 beside open_clip on a CPU: encoding images and texts, and a training step, batch 32.

    pip install -e ".[peers]"
    python tests/peers/vit_b32.py

Both models have random weights and the same sizes, and compute in float32. Prints images, texts and
pairs per second, medians over rounds taken in turn, and the ratios.
"""

import argparse
import itertools

import numpy as np
from turns import Peer, answer, compare, requests, time_of

BATCH = 32
REPEATS = {"image": 2, "text": 4, "train": 2}


def inputs():
    rng = np.random.default_rng(0)
    images = rng.standard_normal((BATCH, 224, 224, 3), dtype=np.float32)
    tokens = rng.integers(1, 49_000, (BATCH, 77), dtype=np.int32)
    tokens[:, -1] = 49_407
    return images, tokens


def model_config(activation: str = "quick_gelu", end_id: int = 49_407):
    """The config of ViT-B/32 with CLIP's text tower."""
    from vlm import config as c

    both: dict = {"activation": activation, "norm_eps": 1e-5, "projection": "linear"}
    return c.ModelConfig(
        vision=c.ViTConfig(patch_size=32, pool="class", pre_norm=True, patch_bias=False, **both),
        text=c.TextConfig(
            vocab_size=49_408,
            context_length=77,
            width=512,
            heads=8,
            mlp_dim=2048,
            causal=True,
            pool="end",
            end_id=end_id,
            **both,
        ),
        embed_dim=512,
    )


def ours() -> None:
    import jax
    import optax
    from flax import nnx

    from vlm.losses import contrastive_loss
    from vlm.models.dual_encoder import DualEncoder

    model = DualEncoder(model_config(), rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    optimizer = optax.adamw(1e-4)
    state = {"params": params, "optimizer": optimizer.init(params)}
    images, tokens = map(jax.numpy.asarray, inputs())

    def loss(params, images, tokens):
        model = nnx.merge(graph, params)
        z_image, z_text = model(images, tokens)
        return contrastive_loss(z_image, z_text, model.logit_scale[...], kind="softmax")

    @jax.jit
    def embed_images(params, images):
        return nnx.merge(graph, params).encode_image(images)

    @jax.jit
    def embed_texts(params, tokens):
        return nnx.merge(graph, params).encode_text(tokens)

    def step(state, images, tokens):
        value, grads = jax.value_and_grad(loss)(state["params"], images, tokens)
        updates, moments = optimizer.update(grads, state["optimizer"], state["params"])
        return {
            "params": optax.apply_updates(state["params"], updates),
            "optimizer": moments,
        }, value

    step = jax.jit(step, donate_argnums=0)

    def train():
        nonlocal state
        state, value = step(state, images, tokens)
        jax.block_until_ready(value)

    serve(
        {
            "image": lambda: embed_images(state["params"], images).block_until_ready(),
            "text": lambda: embed_texts(state["params"], tokens).block_until_ready(),
            "train": train,
        }
    )


def theirs() -> None:
    import open_clip
    import torch

    model = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loss_of = open_clip.ClipLoss()
    images, tokens = inputs()
    images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    tokens = torch.from_numpy(tokens).long()

    def train():
        features = model(images, tokens)
        optimizer.zero_grad()
        loss_of(*features).backward()
        optimizer.step()

    def without_gradients(encode, rows):
        with torch.inference_mode():
            encode(rows, normalize=True)

    serve(
        {
            "image": lambda: without_gradients(model.encode_image, images),
            "text": lambda: without_gradients(model.encode_text, tokens),
            "train": train,
        }
    )


def serve(functions) -> None:
    for what in requests():
        functions[what]()  # takes the memory back that the other side had in its turn
        repeated = itertools.repeat(functions[what], REPEATS[what])
        seconds = sum(time_of(function) for function in repeated)
        answer(REPEATS[what] * BATCH / seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--as", dest="name", choices=("ours", "theirs"))
    args = parser.parse_args()
    if args.name:
        return {"ours": ours, "theirs": theirs}[args.name]()
    return compare([Peer(__file__, n) for n in ("ours", "theirs")], list(REPEATS), args.rounds)


if __name__ == "__main__":
    main()
