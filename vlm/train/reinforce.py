"""Makes reinforced data: a teacher embeds every example, changed in several ways, once for all."""

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from vlm import bundle
from vlm.config import DataConfig, to_dict
from vlm.data.examples import Source
from vlm.data.faults import BadSample
from vlm.data.making import Maker
from vlm.data.reinforced import ARRAYS, FILE, SAME, variant_draws
from vlm.data.sources import open_source, streams
from vlm.errors import ConfigError, DataError
from vlm.paths import in_one_sentence

THREADS = 8  # that open images


def reinforce(
    data: DataConfig,
    out: epath.PathLike,
    teacher: str,
    *,
    variants: int = 4,
    seed: int = 0,
    batch_size: int = 256,
    dtype: str = "float32",
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the teacher's embeddings of `variants` changes of every training example.

    Images are changed as `data.augment` says, at the teacher's own size; of each variant one
    caption is embedded. A sample that cannot be read has no embedding: training passes over it too.

    Args:
        out: a folder of its own.
        teacher: whatever `vlm.load` takes.
        dtype: of the stored numbers: float32, or float16 in half the space.
        report: told how many variants are done, and of how many.

    Returns:
        What the folder says of itself.

    Raises:
        ConfigError: a stream, whose examples have no number; or a setting that cannot be.
        DataError: the folder holds something else, or every sample is broken.
        CheckpointError: there is no such teacher.
    """
    _check(data, variants, batch_size, dtype)
    source, model = open_source(data, data.train_split), bundle.load(teacher)
    if model.preprocess.config.resize == "naflex":
        raise ConfigError(
            f"the teacher {teacher!r} takes images of any aspect (NaFlex), and training makes "
            "square ones: give a teacher of one size"
        )
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty: give a folder of its own")
    maker = Maker([data], model.preprocess)
    shape = (len(source), variants, model.embed_dim)
    about = {
        "teacher": teacher,
        "fingerprint": model.fingerprint,
        "log_scale": math.log(model.logit_scale),
        "seed": seed,
        "variants": variants,
        "examples": len(source),
        "width": model.embed_dim,
        "source": data.source,
        "data": {name: to_dict(data)[name] for name in SAME},
    }
    with in_one_sentence(f"{folder} cannot be written", "give another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        kept = [
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.dtype(dtype), shape)
            for name in ARRAYS
        ]
        _embed_all(source, maker, model, kept, seed, batch_size, report)
        for array in kept:
            array.flush()
        if not np.isfinite(kept[0]).any():
            raise DataError(f"no sample of {data.source} can be read: look at vlm data show")
        # Last, so that what was stopped is not taken for whole.
        (folder / FILE).write_text(json.dumps(about, indent=2) + "\n")
    return about


def _check(data: DataConfig, variants: int, batch_size: int, dtype: str) -> None:
    if streams(data):
        raise ConfigError(
            f"{data.source} is read as a stream, whose examples have no number to keep embeddings "
            'by: set data.access="random"'
        )
    for name, value in (("augmentations", variants), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name} is {value}: make it at least 1")
    if dtype not in ("float32", "float16"):
        raise ConfigError(f"dtype {dtype!r} is none to store: choose float32 or float16")


def _embed_all(
    source: Source,
    maker: Maker,
    model: bundle.Bundle,
    kept: Sequence[np.ndarray],
    seed: int,
    batch_size: int,
    report: Callable[[int, int], None],
) -> None:
    """Fill both arrays, a batch of variants at a time."""
    graph, state = nnx.split(model.model)

    @jax.jit
    def embed(state, images, tokens):
        towers = nnx.merge(graph, state)
        pixels = model.preprocess.normalize(images)
        return towers.encode_image(pixels), towers.encode_text(tokens)

    count, size = kept[0].shape[1], maker.size
    total = len(source) * count
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, total, batch_size):
            rows = np.arange(first, min(first + batch_size, total))
            indices, variants = rows // count, rows % count
            draws = variant_draws(maker, seed, count, indices, variants)
            images = np.zeros((batch_size, size, size, 3), np.uint8)

            def make(row: int, index: int, u: np.ndarray, images=images) -> str | None:
                try:
                    return maker(source[index], u, images[row], f"example {index}")
                except BadSample:
                    return None

            texts = list(pool.map(make, range(len(rows)), indices.tolist(), draws))
            padded = [text or "" for text in texts] + [""] * (batch_size - len(rows))
            z = embed(state, images, model.tokenizer(padded))
            good = np.array([text is not None for text in texts])
            for array, found in zip(kept, z, strict=True):
                found = np.where(good[:, None], np.asarray(found)[: len(rows)], np.nan)
                array[indices, variants] = found
            report(int(rows[-1]) + 1, total)
