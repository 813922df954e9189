"""Search beside faiss in one run: python tests/peers/search.py [--rows 1000000] [--width 512]

Prints queries per second of exact search, batches of 1 and 100, k 10, beside `IndexFlatIP`, and
whether the neighbours are the same; then the codes, with their recall at 10 and memory. The rows
are random, which is the hardest case for codes; `--index FOLDER` takes those of an index instead.
"""

import argparse
import time

import faiss
import numpy as np

from vlm.bench.search import make_bounds
from vlm.heads.retrieval import RetrievalIndex


class Embeddings:
    """Stands where a model would: rows and queries are embeddings already."""

    name, loss, logit_scale, logit_bias = "embeddings", "softmax", 1.0, 0.0


def seconds(*runs, rounds):
    """The best time of each, taken in turns so that all meet the same neighbours on the machine."""
    best = [float("inf")] * len(runs)
    for _ in range(rounds):
        for i, run in enumerate(runs):
            began = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - began)
    return best


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--embeddings", help="an .npy file of rows, such as vlm embed writes")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    if args.embeddings:
        z = np.load(args.embeddings).astype(np.float32)
    else:
        z = rng.standard_normal((args.rows, args.width), np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    queries = z[rng.integers(0, len(z), 100)] + 0.5 / np.sqrt(z.shape[1]) * rng.standard_normal(
        (100, z.shape[1]), np.float32
    )
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    index = RetrievalIndex(Embeddings())
    index.add(z, ids=range(len(z)))
    peer = faiss.IndexFlatIP(z.shape[1])
    peer.add(z)
    make_bounds(index, queries[0])
    truth = index.search(queries, k=10)
    bounds = sum(block.bounds is not None for block in index._items.blocks)
    print(f"{bounds} of {len(index._items.blocks)} blocks have bounds")
    same = np.mean(
        [
            [hit.id for hit in hits] == row.tolist()
            for hits, row in zip(truth, peer.search(queries, 10)[1], strict=True)
        ]
    )
    print(f"{len(z):,} x {z.shape[1]}, k 10; the same ten neighbours: {same:.0%} of queries")
    for batch in (1, 100):
        q = queries[:batch]
        ours, theirs = seconds(
            lambda q=q: index.search(q, k=10), lambda q=q: peer.search(q, 10), rounds=args.rounds
        )
        print(
            f"exact, batch {batch:3}: {batch / ours:8.1f} queries/s, faiss {batch / theirs:8.1f}: "
            f"{theirs / ours:.2f}x"
        )
    for coding in ("int8", "binary"):
        coded = RetrievalIndex(Embeddings(), coding=coding)
        coded.add(z, ids=range(len(z)))
        found = coded.search(queries, k=10)
        both = zip(truth, found, strict=True)
        recall = np.mean([len({h.id for h in a} & {h.id for h in b}) / 10 for a, b in both])
        held = sum(codes.nbytes for codes in coded._items.codes)
        one, many = seconds(
            lambda i=coded: i.search(queries[:1], k=10),
            lambda i=coded: i.search(queries, k=10),
            rounds=args.rounds,
        )
        print(
            f"{coding:6}: recall at 10 {recall:.4f}, memory 1/{z.nbytes / held:.1f}, "
            f"{1 / one:.1f} queries/s alone, {100 / many:.1f} in batches of 100"
        )


if __name__ == "__main__":
    main()
