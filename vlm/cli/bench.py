"""`vlm bench`: measured figures on the machine at hand."""

import dataclasses
import json as jsonlib
from typing import Literal

from vlm.cli import parse
from vlm.config import RematPolicy


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


def train(args: list[str]) -> None:
    parse.call(bench_train, "vlm bench train", args)


def bench_train(
    config: str,
    /,
    batch_size: int | None = None,
    remat: RematPolicy | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] | None = None,
    rounds: int = 3,
    trace: str | None = None,
    save: str | None = None,
    json: bool = False,
) -> None:
    """Measure the training step of a config on this machine: pairs/s, MFU, memory, its parts.

    The batch is random: nothing is read and nothing is saved.

    Examples:
      vlm bench train configs/openmoji.py
      vlm bench train configs/clip_b16_laion.py --batch-size 256 --trace trace/
      vlm bench train configs/clip_b16_laion.py --batch-size 256 --save v5e.json

    Args:
        config: a config file, or a run's config.json.
        batch_size: global, in place of the config's.
        remat: in place of the config's.
        dtype: of products and activations, in place of the config's.
        rounds: of measuring; the best counts.
        trace: a folder for a device trace of one step.
        save: a file that the step's time is added to, for vlm plan --calibration FILE.
        json: print the figures as one JSON object, and the table on stderr.
    """
    from rich.console import Console

    from vlm.config import load_config

    changes = {"batch_size": batch_size, "remat": remat, "dtype": dtype}
    changes = {name: value for name, value in changes.items() if value is not None}
    if batch_size is not None:
        changes["micro_batch_size"] = None
    experiment = dataclasses.replace(load_config(config), **changes)

    from vlm.bench.train import bench_train as measure
    from vlm.training.init_from import resolve

    figures = measure(
        resolve(experiment), rounds=rounds, trace=trace, save=save, console=Console(stderr=json)
    )
    if json:
        print(jsonlib.dumps(figures))


def encode(args: list[str]) -> None:
    parse.call(bench_encode, "vlm bench encode", args)


def bench_encode(
    model: str,
    /,
    batch_sizes: tuple[int, ...] = (1, 8, 32),
    dtype: Literal["float32", "bfloat16"] = "float32",
    rounds: int = 3,
    trace: str | None = None,
    json: bool = False,
) -> None:
    """Measure how fast a model encodes images and texts on one device of this machine.

    Weights and inputs are random, so a config is enough. Decoding of images is not part of it.

    Examples:
      vlm bench encode configs/clip_b32_datacomp.py
      vlm bench encode configs/siglip_b16.py --batch-sizes 64 256 --dtype bfloat16

    Args:
        model: a config file, or a run's config.json.
        batch_sizes: of images and of texts.
        dtype: of products and activations.
        rounds: of measuring; the best counts.
        trace: a folder for a device trace of the largest batch of images.
        json: print the figures as one JSON object, and the table on stderr.
    """
    from rich.console import Console

    from vlm.config import load_config
    from vlm.training.init_from import with_model

    experiment = with_model(load_config(model))

    from vlm.bench.encode import bench_encode as measure

    figures = measure(
        experiment.model,
        name=experiment.name,
        batch_sizes=batch_sizes,
        dtype=dtype,
        rounds=rounds,
        trace=trace,
        console=Console(stderr=json),
    )
    if json:
        print(jsonlib.dumps(figures))


def data(args: list[str]) -> None:
    parse.call(bench_data, "vlm bench data", args)


def bench_data(
    config: str | None = None,
    /,
    batches: int = 8,
    batch_size: int | None = None,
    workers: int | None = None,
    step_seconds: float | None = None,
    json: bool = False,
) -> None:
    """Measure how fast this machine makes the training batches of a config.

    Without a config, the batches are of CLIP ViT-B/32 from shards of synthetic photographs of two
    sizes.

    Examples:
      vlm bench data
      vlm bench data configs/openmoji.py
      vlm bench data configs/clip_b32_cc12m.py --workers 32 --step-seconds 0.5

    Args:
        config: a config file, or a run's config.json.
        batches: how many to time, after the first.
        batch_size: in place of the config's.
        workers: reader processes, in place of the config's.
        step_seconds: of a training step, to say what share of the time it would wait.
        json: print the figures as one JSON object, and the table on stderr.
    """
    from rich.console import Console

    console = Console(stderr=json)
    if config is None:
        from vlm.bench.data import bench_synthetic_data

        sizes = bench_synthetic_data(batches=batches, step_seconds=step_seconds, console=console)
        if json:
            print(jsonlib.dumps(sizes))
        return

    from vlm.bench.data import bench_data as measure
    from vlm.config import load_config
    from vlm.training.init_from import with_model

    experiment = with_model(load_config(config))
    if batch_size is not None:
        experiment = dataclasses.replace(experiment, batch_size=batch_size, micro_batch_size=None)
    if workers is not None:
        reading = dataclasses.replace(experiment.data, workers=workers)
        experiment = dataclasses.replace(experiment, data=reading)
    figures = measure(experiment, batches=batches, step_seconds=step_seconds, console=console)
    if json:
        print(jsonlib.dumps(figures))


def search(args: list[str]) -> None:
    parse.call(bench_search, "vlm bench search", args)


def bench_search(
    items: tuple[int, ...] = (10_000, 100_000),
    embed_dim: int = 512,
    queries: tuple[int, ...] = (1, 64),
    k: int = 10,
    dtype: Literal["float32", "float16"] = "float32",
    rounds: int = 3,
    json: bool = False,
) -> None:
    """Measure exact search over random embeddings, beside the time to read them all once.

    Examples:
      vlm bench search
      vlm bench search --items 1000000 --queries 1 256 --dtype float16

    Args:
        items: sizes of the index.
        embed_dim: width of the embeddings.
        queries: how many are asked at once.
        k: nearest to find.
        dtype: of the stored embeddings.
        rounds: of measuring; the best counts.
        json: print the figures as one JSON object, and the table on stderr.
    """
    from rich.console import Console

    from vlm.bench.search import bench_search as measure

    figures = measure(
        items,
        embed_dim,
        queries=queries,
        k=k,
        dtype=dtype,
        rounds=rounds,
        console=Console(stderr=json),
    )
    if json:
        print(jsonlib.dumps(figures))
