"""Zero-shot and retrieval evaluation on the mesh of a run; each host reads its own images."""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar, assert_never

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int, UInt8

from vlm.config import DataConfig, EvalConfig
from vlm.data.class_names import described
from vlm.data.examples import Source, captions_of
from vlm.data.sources import classes_of, open_to_measure, target_of
from vlm.evaluation.metrics import Metric, pair_retrieval_metrics, zero_shot_metrics
from vlm.evaluation.tasks import DataInfo
from vlm.heads.prompts import label_prompts, normalise
from vlm.heads.templates import choose_templates
from vlm.inputs.tokenizer import Tokenizer
from vlm.sharding import batch_shard, batch_sharding, batch_ways, global_batch
from vlm.training.step import Trainer, TrainState

ROWS = 256  # embedded at a time
THREADS = 8  # that open images

Pixels = UInt8[np.ndarray, "h w 3"]


class Embedder:
    """Encoder of images and texts with the state of a run; all processes get all embeddings."""

    def __init__(self, trainer: Trainer):
        self._trainer, self._mesh, self._preprocess = trainer, trainer.mesh, trainer.preprocess
        ways = batch_ways(self._mesh)
        self._rows = -(-ROWS // ways) * ways

    def texts(self, state: TrainState, tokens: Int[np.ndarray, "m l"]) -> Float[np.ndarray, "m d"]:
        """Compute unit-norm embeddings of texts, which must be equal in all processes."""
        sharding = batch_sharding(self._mesh)
        out = []
        for first in range(0, len(tokens), self._rows):
            part = tokens[first : first + self._rows]
            padded = np.pad(part, [(0, self._rows - len(part)), (0, 0)])
            batch = jax.make_array_from_callback(padded.shape, sharding, padded.__getitem__)
            out.append(np.asarray(self._trainer.embed_texts(state, batch))[: len(part)])
        return np.concatenate(out)

    def prompts(
        self, state: TrainState, tokens: Int[np.ndarray, "m l"], count: int
    ) -> Float[np.ndarray, "c d"]:
        """Compute the embedding of each class: the normalised mean of its `count` prompts."""
        z = self.texts(state, tokens)
        z = z.reshape(-1, count, z.shape[1]).mean(1)
        return normalise(z, "the mean of a class's prompts")

    def classes(self, state: TrainState) -> Float[np.ndarray, "m d"]:
        """Return the weights of the classification head: a row for each class, not normalised."""
        return np.asarray(self._trainer.head(state))

    def images(
        self, state: TrainState, count: int, read: Callable[[int], Pixels]
    ) -> Float[np.ndarray, "n d"]:
        """Compute unit-norm embeddings of images 0 to `count` - 1; each process reads its shard.

        The next rows are read while the devices embed the last ones; images are not stored.
        """
        shard, shards = batch_shard(self._mesh)
        own, prepare = self._rows // shards, self._preprocess
        out: list[np.ndarray] = []
        waiting = None
        with ThreadPoolExecutor(THREADS) as pool:
            steps = -(-count // self._rows)
            for first in range(shard * own, steps * self._rows, self._rows):
                images = prepare.blank(own)
                rows = range(first, min(first + own, count))
                for row, pixels in enumerate(pool.map(read, rows)):
                    prepare.put(images, row, pixels)
                batch = global_batch({"images": images}, self._mesh)["images"]
                z = self._trainer.embed_images(state, batch)
                if waiting is not None:
                    out.append(np.asarray(waiting))
                waiting = z
        return np.concatenate([*out, np.asarray(waiting)])[:count]

    def pixels(self, example: dict, data: DataConfig, i: int) -> Pixels:
        """Preprocess the image of example `i`, without normalisation."""
        where = f"the image of example {i} of {data.source} {data.eval_split}"
        return self._preprocess.pixels(example[data.image], where)


class ZeroShot:
    """Top-k accuracy over the classes of a data set."""

    def __init__(
        self, config: EvalConfig, embedder: Embedder, tokenizer: Tokenizer, run: DataConfig | None
    ):
        self.config, self._embedder = config, embedder
        self._source, self._data = _open(config, label=config.label)
        self._count = _count(config, self._source)
        labels, names = classes_of(self._data, self._source)
        self._names = names  # several classes may share one
        self._index = {label: i for i, label in enumerate(labels)}
        self._target = np.full(self._count, -1)
        self.templates = choose_templates(config.templates or None, run, self._source)
        texts, self.about = prompts_of(labels, names, self.templates)
        self._tokens = tokenizer(texts)

    def measure(self, state: TrainState) -> dict[str, Metric]:
        """Compute `top1` and `top5`."""
        z_image = self._embedder.images(state, self._count, self._read)
        if jax.process_count() > 1:
            self._target = multihost_utils.process_allgather(self._target).max(0)
        z_class = self._embedder.prompts(state, self._tokens, len(self.templates))
        return zero_shot_metrics(z_image, z_class, self._target, names=self._names)

    def _read(self, i: int) -> Pixels:
        example = self._source[i]
        self._target[i] = target_of(example, self._data, self._index, i)
        return self._embedder.pixels(example, self._data, i)


class Retrieval:
    """Recall of images by their captions, and of captions by their images."""

    templates: tuple[str, ...] = ("{}",)
    about: ClassVar[dict[str, str]] = {}

    def __init__(self, config: EvalConfig, embedder: Embedder, tokenizer: Tokenizer):
        self.config, self._embedder = config, embedder
        self._source, self._data = _open(config, captions=config.captions)
        self._count = _count(config, self._source)
        texts = [captions_of(self._source[i], self._data) for i in range(self._count)]
        owners = np.repeat(np.arange(self._count), [len(own) for own in texts])
        self._positives = np.stack([owners, np.arange(len(owners))], axis=1)
        self._tokens = tokenizer([text for own in texts for text in own])

    def measure(self, state: TrainState) -> dict[str, Metric]:
        """Compute `image_to_text_R@1` to `text_to_image_R@10`."""
        z_image = self._embedder.images(
            state, self._count, lambda i: self._embedder.pixels(self._source[i], self._data, i)
        )
        z_text = self._embedder.texts(state, self._tokens)
        return pair_retrieval_metrics(z_image, z_text, self._positives)


def open_task(
    config: EvalConfig, embedder: Embedder, tokenizer: Tokenizer, run: DataConfig | None = None
) -> ZeroShot | Retrieval:
    """Open the evaluation that `config` describes; reads and tokenises its texts.

    Args:
        config: the evaluation.
        embedder, tokenizer: those of the run's model.
        run: the data of the run; its templates are the model's.

    Raises:
        DataError: data is missing, or lacks a column that the task needs.
    """
    match config.task:
        case "zero-shot":
            return ZeroShot(config, embedder, tokenizer, run)
        case "retrieval":
            return Retrieval(config, embedder, tokenizer)
        case _:
            assert_never(config.task)


def prompts_of(
    labels: Sequence[str], names: Sequence[str], templates: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Return the prompts of all classes, and how their names were reworded, for the report."""
    prompts = label_prompts(labels, names, templates)
    reworded = described(labels, names)
    texts = [text for own in prompts.values() for text in own]
    return texts, {"class_names": reworded} if reworded else {}


def info(task: ZeroShot | Retrieval) -> DataInfo:
    """Describe the source of the examples, for the report."""
    return DataInfo(task.config.source, split=task._data.eval_split or "")


def _open(
    config: EvalConfig, *, label: str | None = None, captions: tuple[str, ...] = ()
) -> tuple[Source, DataConfig]:
    """Open the split to evaluate on; returns it with the config it is read by."""
    data = DataConfig(
        source=config.source,
        image=config.image,
        captions=captions,
        label=label,
        class_names=config.class_names if label else None,
        data_dir=config.data_dir,
    )
    source, split = open_to_measure(data, config.split)
    return source, dataclasses.replace(data, eval_split=split)


def _count(config: EvalConfig, source: Source) -> int:
    return min(len(source), config.examples or len(source))
