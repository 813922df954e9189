"""Precompute teacher embeddings of augmented examples, for distillation."""

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
from vlm._deprecation import rename_arguments
from vlm.config import DataConfig, to_dict
from vlm.data.examples import Source
from vlm.data.faults import BadSample
from vlm.data.reinforced import ARRAYS, FILE, MUST_MATCH, UNFINISHED, variant_draws
from vlm.data.sources import open_source, streams
from vlm.data.transform_example import ExampleTransform
from vlm.errors import ConfigError, DataError
from vlm.heads.model_identity import stored_facts
from vlm.paths import as_config_error
from vlm.training.teacher import check_square

THREADS = 8  # that open images
PARTIAL = f"{UNFINISHED}.partial"


@rename_arguments(report="progress")
def reinforce(
    data: DataConfig,
    out: epath.PathLike,
    teacher: str,
    *,
    variants: int = 4,
    seed: int = 0,
    batch_size: int = 256,
    dtype: str = "float32",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the teacher's embeddings of `variants` augmentations of every training example.

    Images are augmented by `data.augment`, at the teacher's own size; each variant has one
    caption. A sample that cannot be read has no embedding: training skips it too. Calling it again
    with equal arguments resumes an interrupted call.

    Args:
        out: an empty or new folder, or one that an interrupted call began.
        teacher: argument of `vlm.load`.
        dtype: of the stored embeddings: float32, or float16 for half the space.
        progress: called with the number of finished variants and the total.

    Returns:
        The metadata written to the folder.

    Raises:
        ConfigError: the data is a stream, whose examples have no index; or a setting is invalid.
        DataError: the folder has other files or other embeddings, or no sample can be read.
        CheckpointError: there is no such teacher.
    """
    _check(data, variants, batch_size, dtype)
    source, model = open_source(data, data.train_split), bundle.load(teacher)
    check_square(teacher, model.preprocess)
    folder = Path(out)
    maker = ExampleTransform([data], model.preprocess)
    shape = (len(source), variants, model.embed_dim)
    about = {
        "teacher": teacher,
        "model": stored_facts(model),
        "log_scale": math.log(model.logit_scale),
        "logit_bias": None if model.config.init_bias is None else model.logit_bias,
        "seed": seed,
        "variants": variants,
        "examples": len(source),
        "width": model.embed_dim,
        "dtype": dtype,
        "source": data.source,
        "data": {name: to_dict(data)[name] for name in MUST_MATCH},
    }
    about = json.loads(json.dumps(about))  # as it is read from the file
    finished = _finished_variants(folder, about)
    with as_config_error(f"{folder} cannot be written", "give another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        _record(folder, about, finished)
        options: dict[str, Any] = {"mode": "r+"}
        if not finished:
            options = {"mode": "w+", "dtype": np.dtype(dtype), "shape": shape}
        arrays = [np.lib.format.open_memmap(folder / f"{name}.npy", **options) for name in ARRAYS]

        def save_progress(done: int) -> None:
            for array in arrays:
                array.flush()
            _record(folder, about, done)  # after the rows: later ones are computed again
            progress(done, len(source) * variants)

        _embed_all(source, maker, model, arrays, seed, batch_size, finished, save_progress)
        if not np.isfinite(arrays[0]).any():
            raise DataError(f"no sample of {data.source} can be read: check it with vlm data show")
        # Last, so that an interrupted call is not taken for complete.
        (folder / UNFINISHED).replace(folder / FILE)
    return about


def _finished_variants(folder: Path, about: dict[str, Any]) -> int:
    """Return the number of variants that an interrupted call embedded into the folder.

    Raises:
        DataError: the folder has other files, or embeddings with other settings.
    """
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if names <= {PARTIAL}:
        return 0
    try:
        before = json.loads((folder / UNFINISHED).read_text())
        done = before.pop("done")
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{folder} is not empty: give an empty or new folder") from None
    differ = [name for name in about if before.get(name) != about[name]]
    if differ:
        raise DataError(
            f"{folder} was started with other {', '.join(differ)}: use the same settings, or give "
            "another folder"
        )
    return done


def _record(folder: Path, about: dict[str, Any], done: int) -> None:
    """Record the number of embedded variants, by an atomic replacement of the file."""
    (folder / PARTIAL).write_text(json.dumps({"done": done, **about}, indent=2) + "\n")
    (folder / PARTIAL).replace(folder / UNFINISHED)


def _check(data: DataConfig, variants: int, batch_size: int, dtype: str) -> None:
    if streams(data):
        raise ConfigError(
            f"{data.source} is read as a stream, whose examples have no index to store "
            'embeddings by: set data.access="random"'
        )
    for name, value in (("augmentations", variants), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name} is {value}: make it at least 1")
    if dtype not in ("float32", "float16"):
        raise ConfigError(f"dtype {dtype!r} cannot be stored: choose float32 or float16")


def _embed_all(
    source: Source,
    maker: ExampleTransform,
    model: bundle.Bundle,
    arrays: Sequence[np.ndarray],
    seed: int,
    batch_size: int,
    start: int,
    save_progress: Callable[[int], None],
) -> None:
    """Fill both arrays from variant `start` on, calling `save_progress` after each batch."""
    graph, state = nnx.split(model.model)

    @jax.jit
    def embed(state, images, tokens):
        towers = nnx.merge(graph, state)
        pixels = model.preprocess.normalize(images)
        return towers.encode_image(pixels), towers.encode_text(tokens)

    count = arrays[0].shape[1]
    total = len(source) * count
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(start, total, batch_size):
            rows = np.arange(first, min(first + batch_size, total))
            indices, variants = rows // count, rows % count
            draws = variant_draws(maker, seed, count, indices, variants)
            images = maker.blank(batch_size)

            def make(row: int, index: int, u: np.ndarray, images=images) -> str | None:
                try:
                    return maker(source[index], u, images, row, f"example {index}")
                except BadSample:
                    return None

            texts = list(pool.map(make, range(len(rows)), indices.tolist(), draws))
            padded = [text or "" for text in texts] + [""] * (batch_size - len(rows))
            z = embed(state, images, model.tokenizer(padded))
            good = np.array([text is not None for text in texts])
            for array, embeddings in zip(arrays, z, strict=True):
                embeddings = np.asarray(embeddings)[: len(rows)]
                array[indices, variants] = np.where(good[:, None], embeddings, np.nan)
            save_progress(int(rows[-1]) + 1)
