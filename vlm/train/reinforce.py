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
from vlm.data.reinforced import ARRAYS, FILE, SAME, UNFINISHED, variant_draws
from vlm.data.sources import open_source, streams
from vlm.data.transform_example import ExampleTransform
from vlm.errors import ConfigError, DataError
from vlm.heads.identity import stored_facts
from vlm.paths import as_config_error
from vlm.train.teacher import check_square

THREADS = 8  # that open images
PARTIAL = f"{UNFINISHED}.partial"


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
    What was stopped goes on with the batch that it had come to, when it is called again alike.

    Args:
        out: a folder of its own, or of the same embeddings, unfinished.
        teacher: whatever `vlm.load` takes.
        dtype: of the stored numbers: float32, or float16 in half the space.
        report: told how many variants are done, and of how many.

    Returns:
        What the folder says of itself.

    Raises:
        ConfigError: a stream, whose examples have no number; or a setting that cannot be.
        DataError: the folder holds something else or other embeddings, or every sample is broken.
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
        "seed": seed,
        "variants": variants,
        "examples": len(source),
        "width": model.embed_dim,
        "dtype": dtype,
        "source": data.source,
        "data": {name: to_dict(data)[name] for name in SAME},
    }
    about = json.loads(json.dumps(about))  # as it is read again
    begun = _begun(folder, about)
    with as_config_error(f"{folder} cannot be written", "give another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        _record(folder, about, begun)
        options: dict[str, Any] = {"mode": "r+"}
        if not begun:
            options = {"mode": "w+", "dtype": np.dtype(dtype), "shape": shape}
        kept = [np.lib.format.open_memmap(folder / f"{name}.npy", **options) for name in ARRAYS]

        def keep(done: int) -> None:
            for array in kept:
                array.flush()
            _record(folder, about, done)  # after the rows: those beyond it are made again
            report(done, len(source) * variants)

        _embed_all(source, maker, model, kept, seed, batch_size, begun, keep)
        if not np.isfinite(kept[0]).any():
            raise DataError(f"no sample of {data.source} can be read: look at vlm data show")
        # Last, so that what was stopped is not taken for whole.
        (folder / UNFINISHED).replace(folder / FILE)
    return about


def _begun(folder: Path, about: dict[str, Any]) -> int:
    """How many variants an earlier call embedded into the folder before it was stopped.

    Raises:
        DataError: the folder holds something else, or embeddings that were begun otherwise.
    """
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if found <= {PARTIAL}:
        return 0
    try:
        before = json.loads((folder / UNFINISHED).read_text())
        done = before.pop("done")
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{folder} is not empty: give a folder of its own") from None
    differ = [name for name in about if before.get(name) != about[name]]
    if differ:
        raise DataError(
            f"{folder} was begun with other {', '.join(differ)}: go on as it was begun, or give "
            "another folder"
        )
    return done


def _record(folder: Path, about: dict[str, Any], done: int) -> None:
    """Write down how many variants are embedded; the file is whole at any moment."""
    (folder / PARTIAL).write_text(json.dumps({"done": done, **about}, indent=2) + "\n")
    (folder / PARTIAL).replace(folder / UNFINISHED)


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
    maker: ExampleTransform,
    model: bundle.Bundle,
    kept: Sequence[np.ndarray],
    seed: int,
    batch_size: int,
    begin: int,
    keep: Callable[[int], None],
) -> None:
    """Fill both arrays from variant `begin` on, a batch at a time; `keep` is told how far it is."""
    graph, state = nnx.split(model.model)

    @jax.jit
    def embed(state, images, tokens):
        towers = nnx.merge(graph, state)
        pixels = model.preprocess.normalize(images)
        return towers.encode_image(pixels), towers.encode_text(tokens)

    count = kept[0].shape[1]
    total = len(source) * count
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(begin, total, batch_size):
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
            for array, found in zip(kept, z, strict=True):
                found = np.where(good[:, None], np.asarray(found)[: len(rows)], np.nan)
                array[indices, variants] = found
            keep(int(rows[-1]) + 1)
