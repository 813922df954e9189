"""What a run is measured on while it trains, and how: by its mesh, each host reading its share."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int, UInt8

from vlm.config import DataConfig, EvalConfig
from vlm.data.examples import Source, captions_of
from vlm.data.sources import open_source
from vlm.errors import DataError
from vlm.evaluate.metrics import Metric, pair_retrieval_metrics, zero_shot_metrics
from vlm.evaluate.tasks import DataInfo
from vlm.heads.prompts import normalise
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import Tokenizer
from vlm.paths import as_path
from vlm.sharding import batch_sharding, batch_share, batch_ways, global_batch
from vlm.train.step import Trainer, TrainState

ROWS = 256  # embedded at a time
THREADS = 8  # that open images

Pixels = UInt8[np.ndarray, "h w 3"]


class Embedder:
    """Embeddings of images and texts by the state of a run; all processes get all of them."""

    def __init__(self, trainer: Trainer):
        self._trainer, self._mesh = trainer, trainer.mesh
        ways = batch_ways(self._mesh)
        self._rows = -(-ROWS // ways) * ways

    def texts(self, state: TrainState, tokens: Int[np.ndarray, "m l"]) -> Float[np.ndarray, "m d"]:
        """Unit-norm embeddings of texts that every process has."""
        sharding = batch_sharding(self._mesh)
        out = []
        for first in range(0, len(tokens), self._rows):
            part = tokens[first : first + self._rows]
            padded = np.pad(part, [(0, self._rows - len(part)), (0, 0)])
            batch = jax.make_array_from_callback(padded.shape, sharding, padded.__getitem__)
            out.append(np.asarray(self._trainer.embed_texts(state, batch))[: len(part)])
        return np.concatenate(out)

    def classes(self, state: TrainState) -> Float[np.ndarray, "m d"]:
        """The weights of a classification's head: a row for each class, of any norm."""
        return np.asarray(self._trainer.head(state))

    def images(
        self, state: TrainState, count: int, read: Callable[[int], Pixels]
    ) -> Float[np.ndarray, "n d"]:
        """Unit-norm embeddings of images 0 to `count` - 1, of which a process reads its share.

        The next rows are read while the devices embed the last ones; no image is kept.
        """
        share, shares = batch_share(self._mesh)
        own, prepare = self._rows // shares, self._trainer.preprocess
        out: list[np.ndarray] = []
        waiting = None
        with ThreadPoolExecutor(THREADS) as pool:
            for first in range(share * own, _round_up(count, self._rows), self._rows):
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


class ZeroShot:
    """Top-k accuracy over the classes of a data set."""

    def __init__(self, config: EvalConfig, embedder: Embedder, inputs: "Inputs"):
        self.config, self._embedder, self._inputs = config, embedder, inputs
        self._data = _data(config, label=config.label)
        self._source = open_source(self._data, config.split)
        self._count = _count(config, self._source)
        labels = getattr(self._source, "label_names", None)
        if not labels:  # a table: its labels are read, which opens no image
            labels = sorted({str(self._source[i][config.label]) for i in range(self._count)})
        self._index = {label: i for i, label in enumerate(labels)}
        self._target = np.full(self._count, -1)
        names = _class_names(config, labels)
        prompts = [t.replace("{}", name) for name in names for t in config.templates]
        self._tokens = inputs.tokenizer(prompts)

    def measure(self, state: TrainState) -> dict[str, Metric]:
        """`top1` and `top5`."""
        z_image = self._embedder.images(state, self._count, self._read)
        if jax.process_count() > 1:
            self._target = multihost_utils.process_allgather(self._target).max(0)
        z = self._embedder.texts(state, self._tokens)
        z = z.reshape(-1, len(self.config.templates), z.shape[1]).mean(1)
        z_class = normalise(z, "the mean of a class's prompts")
        return zero_shot_metrics(z_image, z_class, self._target)

    def _read(self, i: int) -> Pixels:
        example = self._source[i]
        label = str(example[self.config.label])
        if label not in self._index:
            raise DataError(
                f"example {i} of {self.config.source} has the label {label!r}, which the data set "
                "does not list among its classes: mend the label"
            )
        self._target[i] = self._index[label]
        return self._inputs.pixels(example, self._data, i)


class Retrieval:
    """Recall of images by their captions, and of captions by their images."""

    def __init__(self, config: EvalConfig, embedder: Embedder, inputs: "Inputs"):
        self.config, self._embedder, self._inputs = config, embedder, inputs
        self._data = _data(config, captions=config.captions)
        self._source = open_source(self._data, config.split)
        self._count = _count(config, self._source)
        texts = [captions_of(self._source[i], self._data) for i in range(self._count)]
        owners = np.repeat(np.arange(self._count), [len(own) for own in texts])
        self._positives = np.stack([owners, np.arange(len(owners))], axis=1)
        self._tokens = inputs.tokenizer([text for own in texts for text in own])

    def measure(self, state: TrainState) -> dict[str, Metric]:
        """`image_to_text_R@1` to `text_to_image_R@10`."""
        z_image = self._embedder.images(
            state, self._count, lambda i: self._inputs.pixels(self._source[i], self._data, i)
        )
        z_text = self._embedder.texts(state, self._tokens)
        return pair_retrieval_metrics(z_image, z_text, self._positives)


class Inputs:
    """The two halves of the model's input contract, as evaluations use them."""

    def __init__(self, preprocess: Preprocess, tokenizer: Tokenizer):
        self.preprocess, self.tokenizer = preprocess, tokenizer

    def pixels(self, example: dict, data: DataConfig, i: int) -> Pixels:
        """The image of example `i` as the model takes it, but for normalisation."""
        where = f"the image of example {i} of {data.source} {data.eval_split}"
        return self.preprocess.pixels(example[data.image], where)


def open_task(config: EvalConfig, embedder: Embedder, inputs: Inputs) -> ZeroShot | Retrieval:
    """The evaluation that `config` describes, its texts read and tokenised.

    Raises:
        DataError: no such data, or data that does not have what the task needs.
    """
    kind = ZeroShot if config.task == "zero-shot" else Retrieval
    return kind(config, embedder, inputs)


def info(config: EvalConfig) -> DataInfo:
    """Where the examples come from, for the report."""
    return DataInfo(config.source, split=config.split)


def _data(config: EvalConfig, *, label: str | None = None, captions=()) -> DataConfig:
    """The same source as training data has it."""
    return DataConfig(
        source=config.source,
        train_split=config.split,  # what has no splits is all of this one
        eval_split=config.split,
        image=config.image,
        captions=captions,
        label=label,
        data_dir=config.data_dir,
    )


def _count(config: EvalConfig, source: Source) -> int:
    return min(len(source), config.examples or len(source))


def _class_names(config: EvalConfig, labels: list[str]) -> list[str]:
    """What each label is called in a prompt."""
    if config.class_names is None:
        return labels
    file = as_path(config.class_names)
    if not file.is_file():
        raise DataError(f"there is no file of class names {file}: check evals {config.name!r}")
    lines = [line for line in file.read_text().splitlines() if line.strip()]
    pairs = dict(line.split("\t", 1) for line in lines if "\t" in line)
    missing = [label for label in labels if label not in pairs]
    if not pairs and len(lines) == len(labels):
        return lines
    if missing:
        raise DataError(
            f"{file} has {len(lines)} lines for the {len(labels)} labels of {config.source}, and "
            f"none names {missing[0]!r}: give a name for each, in order or as LABEL<tab>NAME"
        )
    return [pairs[label] for label in labels]


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
