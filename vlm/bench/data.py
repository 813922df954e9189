"""Benchmark of the input pipeline: pairs per second of reading, augmenting and tokenizing."""

import io
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from vlm.config import AugmentConfig, DataConfig, Experiment
from vlm.data.pipeline import train_batches
from vlm.inputs.preprocess import Preprocess
from vlm.models import recipes
from vlm.planning.needs import batches_ahead
from vlm.training.start import tokenizer_of

SIZES = ((640, 427), (1280, 960))  # of synthetic photographs
SHARDS, EACH, DIFFERENT = 16, 100, 40


def bench_data(
    experiment: Experiment,
    *,
    batches: int = 8,
    step_seconds: float | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure the throughput of a run's training batches, without training; print it.

    The first batch starts the readers and fills caches, so it is timed separately. The batches that
    were read ahead meanwhile are not timed.

    Args:
        batches: number of batches to time.
        step_seconds: duration of a training step, to estimate the share of time spent waiting.

    Returns:
        the printed figures as JSON values.

    Raises:
        DataError: the data does not exist.

    Example:
        >>> from rich.console import Console
        >>> result = vlm.bench.bench_data(experiment, batches=1, console=Console(quiet=True))
        >>> result["batch_size"]
        8
    """
    e, data = experiment, experiment.data
    stream = train_batches(
        data, Preprocess(e.preprocess), tokenizer_of(e), batch_size=e.batch_size, seed=e.seed
    )
    times = []
    for _ in range(1 + batches_ahead(data) + batches):
        began = time.perf_counter()
        next(stream)
        times.append(time.perf_counter() - began)
    stream.close()
    seconds = sum(times[-batches:]) / batches
    result = {
        "source": data.source,
        "batch_size": e.batch_size,
        "image_size": e.preprocess.image_size,
        "max_patches": e.preprocess.max_patches if e.preprocess.resize == "naflex" else None,
        "workers": data.workers,
        "cache": data.cache,
        "first_seconds": times[0],
        "seconds": seconds,
        "pairs_per_second": e.batch_size / seconds,
        "step_seconds": step_seconds,
        "waiting": max(0.0, 1 - step_seconds / seconds) if step_seconds else None,
    }
    _print(result, console or Console())
    return result


def bench_synthetic_data(
    *, batches: int = 8, step_seconds: float | None = None, console: Console | None = None
) -> list[dict[str, Any]]:
    """Run `bench_data` on shards of synthetic JPEG photographs of two sizes.

    The run is that of CLIP ViT-B/32, with crops of 80 to 100% of the area to 224 pixels.
    """
    found = []
    for width, height in SIZES:
        with tempfile.TemporaryDirectory(prefix=f"vlm-bench-{width}x{height}-") as folder:
            write_shards(Path(folder), width, height)
            experiment = Experiment(
                **recipes.clip("B/32"),
                name=f"{width}x{height}",
                data=DataConfig(
                    f"{folder}/{{000..{SHARDS - 1:03d}}}.tar",
                    eval_split=None,
                    access="stream",
                    augment=AugmentConfig(crop=(0.8, 1.0)),
                    shuffle=512,
                ),
                batch_size=64,
            )
            found.append(
                bench_data(experiment, batches=batches, step_seconds=step_seconds, console=console)
            )
    return found


def write_shards(folder: Path, width: int, height: int) -> None:
    """Write WebDataset shards of synthetic photographs, each photograph in several shards."""
    images = [_photo(number, width, height) for number in range(DIFFERENT)]
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for i in range(EACH):
                number = shard * EACH + i
                text = f"a photograph of something, number {number}, seen from the side"
                for suffix, data in (("jpg", images[number % DIFFERENT]), ("txt", text.encode())):
                    info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def _photo(seed: int, width: int, height: int) -> bytes:
    """JPEG of noise with detail at every scale, as in photographs."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for level in range(2, 9):
        grid = Image.fromarray(rng.integers(0, 256, (2**level, 2**level, 3), np.uint8))
        pixels += 1.2 * (np.asarray(grid.resize((width, height))) - 127.0) / level**1.5
    out = io.BytesIO()
    image = Image.fromarray(np.clip(pixels + 127, 0, 255).astype(np.uint8))
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def _print(result, console):
    of = f"{result['image_size']} pixels"
    if result["max_patches"] is not None:
        of = f"at most {result['max_patches']} patches"
    console.print(
        f"[bold]{result['source']}[/]: batches of {result['batch_size']:,} images of {of}, "
        f"{result['workers']} reader processes\n{result['pairs_per_second']:,.1f} pairs/s "
        f"({result['seconds']:.3g} s a batch; the first took {result['first_seconds']:.3g} s)",
        highlight=False,
    )
    if result["waiting"] is not None:
        console.print(
            f"a step of {result['step_seconds']:.3g} s would wait {result['waiting']:.1%} of the "
            "time",
            highlight=False,
        )
