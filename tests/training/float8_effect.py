"""The effect of float8 products on the loss: python tests/training/float8_effect.py [STEPS]

Trains the small OpenMoji model of selection_speed.py with bfloat16 products and with float8 ones in
its blocks. Seeds differ in parameters and data order, and each is used by both. Prints the mean
loss of the last steps and the zero-shot accuracy on the validation split, among the captions of all
splits. A CPU emulates both types: the values are a GPU's up to the order of sums, the speed is not.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
from selection_speed import BASE, OpenMoji, accuracy

from vlm.config import MeshConfig
from vlm.sharding import make_mesh
from vlm.training.step import Trainer

SEEDS, LAST = (0, 1, 2), 10
MESH = make_mesh(MeshConfig(), jax.devices()[:1])


def trainer(matmul_dtype, seed: int = 0) -> Trainer:
    changes = {"dtype": "bfloat16", "scan": True, "seed": seed, "matmul_dtype": matmul_dtype}
    return Trainer(dataclasses.replace(BASE, **changes), MESH)


def run(steps: int, used: Trainer, data: OpenMoji, seed: int) -> tuple[float, float]:
    """Mean loss of the last steps and accuracy; the step's program is one for all seeds."""
    state, random = trainer(None, seed).init(jnp.int32(steps)), np.random.default_rng(seed)
    images, tokens = data.images["train"], data.tokenizer(data.texts["train"])
    losses = []
    for _ in range(steps):
        rows = random.choice(len(images), BASE.batch_size, replace=False)
        state, metrics = used.step(state, {"images": images[rows], "tokens": tokens[rows]})
        losses.append(float(metrics["loss"]))
    return float(np.mean(losses[-LAST:])), accuracy(used, state, data, "validation")


def main(steps: int) -> None:
    data, found = OpenMoji(), {}
    trainers = {"bfloat16": trainer(None), "float8": trainer("float8")}
    for seed in SEEDS:
        for name, used in trainers.items():
            loss, right = run(steps, used, data, seed)
            found.setdefault(name, []).append((loss, right))
            print(f"seed {seed}, {name}: loss {loss:.4f}, accuracy {right:.1%}", flush=True)
    for name, values in found.items():
        (loss, right), (loss_of, right_of) = np.mean(values, 0), np.std(values, 0, ddof=1)
        print(f"{name}: loss {loss:.4f} +- {loss_of:.4f}, accuracy {right:.1%} +- {right_of:.1%}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 240)
