"""`vlm bench`: measured figures on the machine at hand."""

import json as jsonlib
from typing import Literal

from vlm.cli import parse


def loss(args: list[str]) -> None:
    parse.call(bench_loss, "vlm bench loss", args)


def bench_loss(
    batch_size: int = 16_384,
    embed_dim: int = 512,
    kinds: tuple[Literal["softmax", "sigmoid"], ...] = ("softmax", "sigmoid"),
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    tile: int | None = None,
    dense: bool = True,
    rounds: int = 5,
    json: bool = False,
) -> None:
    """Measure the contrastive losses on this machine: time, memory, and the error of gradients.

    Times are of loss and backward pass, beside the floor that the machine's own matrix products
    set.

    Examples:
      vlm bench loss
      vlm bench loss --batch-size 4096 --kinds sigmoid

    Args:
        batch_size: pairs over all devices.
        embed_dim: width of the embeddings.
        kinds: which losses.
        dtype: of the embeddings; auto is float32 on a CPU and bfloat16 elsewhere.
        tile: rows of a tile; None chooses from the shapes.
        dense: also the plain loss, where its matrix stays under 2 GiB.
        rounds: of measuring; the best counts.
        json: print the figures as one JSON object, and the table on stderr.
    """
    from rich.console import Console

    from vlm.bench.loss import bench_loss as measure

    figures = measure(
        batch_size,
        embed_dim,
        kinds=kinds,
        dtype=dtype,
        tile=tile,
        dense=dense,
        rounds=rounds,
        console=Console(stderr=json),
    )
    if json:
        print(jsonlib.dumps(figures))
