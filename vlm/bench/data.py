"""Benchmark of the input pipeline: pairs per second of reading, augmenting and tokenizing."""

import time
from typing import Any

from rich.console import Console

from vlm.config import Experiment
from vlm.data.pipeline import train_batches
from vlm.inputs.preprocess import Preprocess
from vlm.training.start import tokenizer_of


def bench_data(
    experiment: Experiment,
    *,
    batches: int = 8,
    step_seconds: float | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure the throughput of a run's training batches, without training; print it.

    The first batch starts the readers and fills caches, so it is timed separately.

    Args:
        batches: number of batches to time.
        step_seconds: duration of a training step, to estimate the share of time spent waiting.

    Returns:
        the printed figures as JSON values.

    Raises:
        DataError: the data does not exist.

    Example:
        >>> from rich.console import Console
        >>> found = vlm.bench.bench_data(experiment, batches=1, console=Console(quiet=True))
        >>> found["batch_size"]
        8
    """
    e, data = experiment, experiment.data
    stream = train_batches(
        data, Preprocess(e.preprocess), tokenizer_of(e), batch_size=e.batch_size, seed=e.seed
    )
    began = time.perf_counter()
    next(stream)
    first = time.perf_counter() - began
    times = []
    for _ in range(batches):
        began = time.perf_counter()
        next(stream)
        times.append(time.perf_counter() - began)
    stream.close()
    seconds = sum(times) / batches
    result = {
        "source": data.source,
        "batch_size": e.batch_size,
        "image_size": e.preprocess.image_size,
        "max_patches": e.preprocess.max_patches if e.preprocess.resize == "naflex" else None,
        "workers": data.workers,
        "cache": data.cache,
        "first_seconds": first,
        "seconds": seconds,
        "pairs_per_second": e.batch_size / seconds,
        "step_seconds": step_seconds,
        "waiting": max(0.0, 1 - step_seconds / seconds) if step_seconds else None,
    }
    _print(result, console or Console())
    return result


def _print(result, console):
    of = f"{result['image_size']} pixels"
    if result["max_patches"] is not None:
        of = f"at most {result['max_patches']} patches"
    console.print(
        f"[bold]{result['source']}[/]: batches of {result['batch_size']:,} images of {of}, "
        f"{result['workers']} reader processes",
        highlight=False,
    )
    console.print(
        f"{result['pairs_per_second']:,.1f} pairs/s ({result['seconds']:.3g} s a batch; the first "
        f"took {result['first_seconds']:.3g} s)",
        highlight=False,
    )
    if result["waiting"] is not None:
        console.print(
            f"a step of {result['step_seconds']:.3g} s would wait {result['waiting']:.1%} of the "
            "time",
            highlight=False,
        )
