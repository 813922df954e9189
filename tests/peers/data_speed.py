"""Shards to augmented batches: vlm, slow storage, bare decoding and open_clip.

    pip install -e ".[peers]"
    python tests/peers/data_speed.py

Synthetic photographs as JPEG in WebDataset shards; random crops of 80 to 100% of the area to 224
pixels, and captions to tokens. Each side is a process that uses all cores; they run interleaved.
Prints median pairs per second. Without the extra `peers`, open_clip is left out.
"""

import argparse
import functools
import io
import itertools
import os
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import slow_storage
from PIL import Image
from rich.console import Console
from rich.table import Table
from turns import Peer, answer, requests

from vlm.bench.data import DIFFERENT, SHARDS, SIZES, write_shards
from vlm.config import AugmentConfig, DataConfig, PreprocessConfig

BATCH, SIDE, CONTEXT = 64, 224, 77
AUGMENT = AugmentConfig(crop=(0.8, 1.0))
PREPROCESS = PreprocessConfig(image_size=SIDE, resize="crop")


def compare(rounds: int = 5, seconds: float = 3.0) -> None:
    """Print median pairs per second of each side for images of two sizes."""
    names = ["ours", "ours, slow storage", "bare"]
    if find_spec("open_clip_train") and find_spec("webdataset") and find_spec("pandas"):
        names.append("open_clip")
    for width, height in SIZES:
        with tempfile.TemporaryDirectory(prefix="vlm-bench-") as folder:
            write_shards(Path(folder), width, height)
            peers = [Peer(__file__, name, "--folder", folder) for name in names]
            speeds: dict[str, list[float]] = {name: [] for name in names}
            try:
                for number in range(rounds + 1):
                    for peer in peers:
                        (speed,) = peer.take(str(seconds))
                        if number:  # the first one fills caches and starts workers
                            speeds[peer.name].append(speed)
            finally:
                for peer in peers:
                    peer.stop()
        figures = {name: float(np.median(values)) for name, values in speeds.items()}
        table = Table(f"{width}x{height} JPEG to {SIDE}", "pairs/s", "ours is", box=None)
        for name, speed in figures.items():
            ratio = f"{figures['ours'] / speed:.2f}x"
            table.add_row(name, f"{speed:,.0f}", f"{_cores()} cores" if name == "ours" else ratio)
        Console().print(table)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _serve(batches, ahead: int) -> None:
    """Answer requests for seconds of batches with their pairs per second."""
    for least in map(float, requests()):
        for _ in range(ahead):  # prefetched before the measurement
            next(batches)
        began, count = time.perf_counter(), 0
        while (seconds := time.perf_counter() - began) < least or not count:
            next(batches)
            count += 1
        answer(count * BATCH / seconds)


def _ours(folder: str) -> None:
    from vlm.data.pipeline import train_batches
    from vlm.inputs.preprocess import Preprocess
    from vlm.weights.vocabularies import clip_tokenizer

    slow_storage.register()
    config = DataConfig(
        f"{folder}/{{000..{SHARDS - 1:03d}}}.tar",
        eval_split=None,
        access="stream",
        augment=AUGMENT,
        shuffle=512,
        prefetch=2,
    )
    batches = train_batches(
        config, Preprocess(PREPROCESS), clip_tokenizer(CONTEXT), batch_size=BATCH, seed=0
    )
    _serve(batches, ahead=4)


def _bare(folder: str) -> None:
    """Only decode (at the JPEG scale that the crop allows) and resize."""
    from vlm.data.randomness import uniforms
    from vlm.data.transform_example import NUMBERS
    from vlm.data.transforms import Augment
    from vlm.inputs.preprocess import Preprocess

    augment = Augment(AUGMENT, Preprocess(PREPROCESS))
    with tarfile.open(f"{folder}/000.tar") as tar:
        files = [tar.extractfile(m) for m in tar if m.name.endswith(".jpg")]
        images = [file.read() for file in files if file is not None][:DIFFERENT]

    def one(number: int) -> None:
        u = draws[number % len(draws)]
        image = Image.open(io.BytesIO(images[number % DIFFERENT]))
        size = image.size
        image.draft(None, augment.smallest(*size, u[:-1]))
        augment(image, u[:-1], size)

    draws = uniforms(0, np.arange(997), NUMBERS)
    numbers = itertools.count()
    cores = _cores()

    def batch() -> None:
        some = [next(numbers) for _ in range(BATCH)]
        list(pool.map(lambda part: [one(n) for n in part], [some[k::cores] for k in range(cores)]))

    with ThreadPoolExecutor(cores) as pool:
        _serve(iter(lambda: batch() or True, None), ahead=1)


def _open_clip(folder: str) -> None:
    """open_clip's pipeline with a worker per core; vlm itself does not need open_clip."""
    from importlib import import_module

    open_clip = import_module("open_clip")
    data: Any = import_module("open_clip_train.data")
    expand = data.tar_file_expander  # newer releases of webdataset mark the end of a shard
    data.tar_file_expander = functools.partial(expand, eof_value=None)
    augment = open_clip.AugmentationCfg(scale=AUGMENT.crop)
    transform = open_clip.image_transform(SIDE, is_train=True, aug_cfg=augment)
    arguments = argparse.Namespace(
        train_data=f"{folder}/{{000..{SHARDS - 1:03d}}}.tar",
        train_num_samples=10**9,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        seed=0,
        batch_size=BATCH,
        workers=_cores(),
        world_size=1,
    )
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    loader = data.get_wds_dataset(arguments, transform, True, tokenizer=tokenizer).dataloader
    _serve(iter(loader), ahead=2 * _cores() + 2)


def main() -> None:
    """Compare all sides, or run the side `--as NAME` with requests on stdin."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--as", dest="name")
    parser.add_argument("--folder")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.name is None:
        compare(args.rounds)
    elif args.name == "ours":
        _ours(args.folder)
    elif args.name == "ours, slow storage":
        _ours(f"slow://{args.folder}")
    elif args.name == "bare":
        _bare(args.folder)
    else:
        _open_clip(args.folder)


if __name__ == "__main__":
    main()
