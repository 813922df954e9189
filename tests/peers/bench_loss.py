"""Loss and backward pass beside open_clip's `ClipLoss` and `SigLipLoss`, in one run.

    python tests/peers/bench_loss.py [--batch 16384] [--rounds 5] [--peer-python PYTHON]
        [--chunk 1024]

Each side is a process of its own with two threads; they take turns, so both meet the same load. The
floor is 8 B^2 d over the rate of matrix products, measured in the same turns. `--peer-python` names
the interpreter that has open_clip (extra `peers`), when it is not this one. `--chunk` is the
chunk size of open_clip's sigmoid loss, which version 3.3 does not have (its main branch does: put
its `src` on PYTHONPATH).
"""

import argparse
import json
import os
import subprocess
import sys
import time

THREADS = 2
WIDTH = 512
KINDS = ("softmax", "sigmoid")
SIDE, PRODUCTS = 2048, 16  # the matrices whose products set the floor: about a second in all


def embeddings(batch_size):
    """Unit norm, pairs alike; the same numbers on both sides."""
    import numpy as np

    rng = np.random.default_rng(0)
    image, noise = rng.standard_normal((2, batch_size, WIDTH), dtype=np.float32)
    text = image + 3 * noise
    return [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text)]


def ours(batch_size):
    """Name -> a function that runs it once and returns the loss."""
    import jax
    import jax.numpy as jnp

    from vlm.losses import contrastive_loss

    inputs = *map(jnp.asarray, embeddings(batch_size)), jnp.log(20.0), jnp.float32(-10.0)
    square = jnp.ones((SIDE, SIDE))
    product = jax.jit(lambda m: m @ m)

    def products():
        for _ in range(PRODUCTS):
            jax.block_until_ready(product(square))
        return 0.0

    def run(kind):
        def loss(*inputs):
            return contrastive_loss(*inputs, kind=kind)

        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
        return lambda: float(jax.block_until_ready(compiled(*inputs))[0])

    return {"product": products, **{kind: run(kind) for kind in KINDS}}


def theirs(batch_size, chunk):
    import torch
    from open_clip.loss import ClipLoss, SigLipLoss

    torch.set_num_threads(THREADS)
    image, text = (torch.from_numpy(x).requires_grad_() for x in embeddings(batch_size))
    log_scale = torch.tensor(20.0).log().requires_grad_()
    bias = torch.tensor(-10.0, requires_grad=True)
    options = {"chunk_size": chunk} if chunk else {}
    losses = {"softmax": (ClipLoss(), ()), "sigmoid": (SigLipLoss(**options), (bias,))}

    def run(kind):
        loss, more = losses[kind]

        def once():
            for x in (image, text, log_scale, bias):
                x.grad = None
            value = loss(image, text, log_scale.exp(), *more)
            value.backward()
            return value.item()

        return once

    return {kind: run(kind) for kind in KINDS}


def serve(runs):
    """Run what standard input names, and answer with seconds and the loss."""
    for line in sys.stdin:
        start = time.perf_counter()
        value = runs[line.strip()]()
        print(json.dumps([time.perf_counter() - start, value]), flush=True)


class Side:
    """One of the two processes."""

    def __init__(self, python, side, batch_size, chunk=0):
        # XLA counts the cores that it may use; both sides are bound to the same two.
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:THREADS]))
        command = ["taskset", "-c", cores, python, __file__]
        command += ["--serve", side, "--batch", batch_size, "--chunk", chunk]
        self.process = subprocess.Popen(
            [*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, name):
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--chunk", type=int, default=0)
    parser.add_argument("--serve", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(ours(args.batch) if args.serve == "ours" else theirs(args.batch, args.chunk))
        return

    sides = {
        "ours": Side(sys.executable, "ours", args.batch),
        "theirs": Side(args.peer_python, "theirs", args.batch, args.chunk),
    }
    seconds = {}
    names = [("ours", "product"), *((side, kind) for kind in KINDS for side in sides)]
    for turn in range(args.rounds + 1):  # the first warms up
        for side, name in names:
            took, value = sides[side].run(name)
            if turn:
                seconds.setdefault((side, name), []).append(took)
            elif name in KINDS:
                print(f"{name} {side}: loss {value:.6f}")
    for side in sides.values():
        side.close()

    best = {name: min(times) for name, times in seconds.items()}
    rate = PRODUCTS * 2 * SIDE**3 / best["ours", "product"]
    floor = 8 * args.batch**2 * WIDTH / rate
    print(f"batch {args.batch}, products at {rate / 1e9:.0f} GFLOP/s: floor {floor:.2f} s")
    for kind in KINDS:
        a, b = best["ours", kind], best["theirs", kind]
        print(f"{kind}: {a:.2f} s, open_clip {b:.2f} s: {a / b:.2f}x; {a / floor:.2f}x the floor")


if __name__ == "__main__":
    main()
