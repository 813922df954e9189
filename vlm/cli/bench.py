"""`vlm bench`: measurements on this machine."""

import dataclasses
import json as jsonlib
from collections.abc import Callable
from typing import Any, Literal

from vlm.cli import options
from vlm.config import Experiment, RematPolicy, load_config


def _report(measure: Callable[..., Any], *args: Any, json: bool, **settings: Any) -> None:
    """Call a benchmark of `vlm.bench`, which prints a table; with `json`, print its figures."""
    from rich.console import Console

    figures = measure(*args, **settings, console=Console(stderr=json))
    if json:
        print(jsonlib.dumps(figures))


def _experiment(config: str, batch_size: int | None, **changes: Any) -> Experiment:
    """Load a config and replace those fields whose new value is not None."""
    changes = {name: value for name, value in changes.items() if value is not None}
    if batch_size is not None:
        changes |= {"batch_size": batch_size, "micro_batch_size": None}
    return dataclasses.replace(load_config(config), **changes)


def loss(
    batch_size: int = 16_384,
    embed_dim: int = 512,
    kinds: tuple[Literal["softmax", "sigmoid"], ...] = ("softmax", "sigmoid"),
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    tile: int | None = None,
    dense: bool = True,
    rounds: options.Rounds = 5,
    json: options.Json = False,
) -> None:
    """Measure time, memory and gradient error of the contrastive losses.

    Times include the backward pass, and are compared with 8 B² d FLOPs at the measured GEMM
    throughput.

    Examples:
      vlm bench loss
      vlm bench loss --batch-size 4096 --kinds sigmoid

    Args:
        batch_size: pairs over all devices.
        embed_dim: width of the embeddings.
        kinds: losses to measure.
        dtype: type of the embeddings. auto: float32 on a CPU, bfloat16 elsewhere.
        tile: rows of a tile. None: chosen by the shapes.
        dense: also measure the naive dense loss, if its matrix is under 2 GiB.
    """
    from vlm.bench.loss import bench_loss

    settings = {"kinds": kinds, "dtype": dtype, "tile": tile, "dense": dense, "rounds": rounds}
    _report(bench_loss, batch_size, embed_dim, **settings, json=json)


def train(
    config: str,
    /,
    batch_size: int | None = None,
    remat: RematPolicy | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] | None = None,
    rounds: options.Rounds = 3,
    trace: str | None = None,
    save: str | None = None,
    json: options.Json = False,
) -> None:
    """Measure pairs/s, MFU and memory of the training step of a config, and its parts.

    The batch is random: no data is read, and no checkpoint is written.

    Examples:
      vlm bench train configs/openmoji.py
      vlm bench train configs/clip_b16_laion.py --batch-size 256 --trace trace/
      vlm bench train configs/clip_b16_laion.py --batch-size 256 --save v5e.json

    Args:
        config: a config file, or a run's config.json.
        batch_size: global batch size. None: the config's.
        remat: rematerialisation policy. None: the config's.
        dtype: type of matrix products and activations. None: the config's.
        trace: write a device trace of one step to this folder.
        save: add the step time to this file, for vlm plan --calibration FILE.
    """
    experiment = _experiment(config, batch_size, remat=remat, dtype=dtype)

    from vlm.bench.train import bench_train
    from vlm.training.init_from import resolve

    _report(bench_train, resolve(experiment), rounds=rounds, trace=trace, save=save, json=json)


def encode(
    model: str,
    /,
    batch_sizes: tuple[int, ...] = (1, 8, 32),
    dtype: Literal["float32", "bfloat16"] = "float32",
    rounds: options.Rounds = 3,
    trace: str | None = None,
    json: options.Json = False,
) -> None:
    """Measure the throughput of encoding images and texts on one device.

    Weights and inputs are random, so a config is enough. Decoding of images is not measured.

    Examples:
      vlm bench encode configs/clip_b32_datacomp.py
      vlm bench encode configs/siglip_b16.py --batch-sizes 64 256 --dtype bfloat16

    Args:
        model: a config file, or a run's config.json.
        batch_sizes: batch sizes of images and of texts.
        dtype: type of matrix products and activations.
        trace: write a device trace of the largest batch of images to this folder.
    """
    from vlm.training.init_from import with_model

    experiment = with_model(load_config(model))

    from vlm.bench.encode import bench_encode

    settings = {"batch_sizes": batch_sizes, "dtype": dtype, "rounds": rounds, "trace": trace}
    _report(bench_encode, experiment.model, name=experiment.name, **settings, json=json)


def data(
    config: str | None = None,
    /,
    batches: int = 8,
    batch_size: int | None = None,
    workers: int | None = None,
    step_seconds: float | None = None,
    json: options.Json = False,
) -> None:
    """Measure the throughput of the training batches of a config.

    Without a config, the batches are of CLIP ViT-B/32 from shards of synthetic photographs of two
    sizes.

    Examples:
      vlm bench data
      vlm bench data configs/openmoji.py
      vlm bench data configs/clip_b32_cc12m.py --workers 32 --step-seconds 0.5

    Args:
        config: a config file, or a run's config.json. None: synthetic photographs.
        batches: number of batches to time, after the first.
        batch_size: batch size. None: the config's.
        workers: number of reader processes. None: the config's.
        step_seconds: seconds of a training step, to estimate the fraction of time spent waiting.
    """
    settings = {"batches": batches, "step_seconds": step_seconds, "json": json}
    if config is None:
        from vlm.bench.data import bench_synthetic_data

        _report(bench_synthetic_data, **settings)
        return

    from vlm.bench.data import bench_data
    from vlm.training.init_from import with_model

    experiment = with_model(_experiment(config, batch_size))
    if workers is not None:
        reading = dataclasses.replace(experiment.data, workers=workers)
        experiment = dataclasses.replace(experiment, data=reading)
    _report(bench_data, experiment, **settings)


def search(
    items: tuple[int, ...] = (10_000, 100_000),
    embed_dim: int = 512,
    queries: tuple[int, ...] = (1, 64),
    k: int = 10,
    dtype: Literal["float32", "float16"] = "float32",
    rounds: options.Rounds = 3,
    json: options.Json = False,
) -> None:
    """Measure exact search in random embeddings, compared with the time to read them once.

    Examples:
      vlm bench search
      vlm bench search --items 1000000 --queries 1 256 --dtype float16

    Args:
        items: sizes of the index.
        embed_dim: width of the embeddings.
        queries: numbers of queries in one call.
        k: number of nearest neighbours.
        dtype: type of the stored embeddings.
    """
    from vlm.bench.search import bench_search

    settings = {"queries": queries, "k": k, "dtype": dtype, "rounds": rounds}
    _report(bench_search, items, embed_dim, **settings, json=json)
