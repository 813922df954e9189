"""Statistics of a data set from a sample of its examples."""

import collections
import contextlib
import dataclasses
import hashlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from vlm.config import DataConfig
from vlm.data.example_reader import ExampleReader, Read
from vlm.data.examples import Example, captions_of, scan
from vlm.data.faults import BadSample
from vlm.data.mixing import MixingResult, group_of, measure
from vlm.data.shards import Shards
from vlm.data.sources import has_shards, open_source, open_stream, streams
from vlm.data.storage import READERS
from vlm.data.transform_example import open_image_of
from vlm.data.weighted_order import order_of, refuse_weights
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import Tokenizer
from vlm.paths import is_remote

THUMBNAIL = 160  # pixels of the long side

_BATCHES = 8  # whose mixing is measured
_SCANNED = 1 << 20  # examples whose classes are counted, at most


@dataclass
class DatasetStats:
    """Statistics of the inspected examples; lists have one entry per good example."""

    source: str
    description: str  # number of examples or shards
    looked_at: int = 0
    good: int = 0
    features: dict[str, str] = field(default_factory=dict)  # name to type
    captions: list[int] = field(default_factory=list)  # number per example
    tokens: list[int] = field(default_factory=list)  # number in each first caption, not truncated
    context_length: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)  # width, height
    file_bytes: list[int] = field(default_factory=list)
    duplicates: int = 0  # images equal or nearly equal to an earlier one
    bad: list[dict[str, Any]] = field(default_factory=list)
    mixing: MixingResult | None = None  # None: not a stream, or not measured
    weights: str = ""  # their effect on an epoch; empty without weights
    shown: list[tuple[bytes, list[str]]] = field(default_factory=list)  # JPEG thumbnails, captions

    @property
    def too_long(self) -> int:
        """Number of first captions longer than the context."""
        return sum(count > self.context_length for count in self.tokens)

    def summary(self) -> dict[str, Any]:
        """Return the statistics as JSON values."""
        kinds: collections.Counter[str] = collections.Counter()
        for record in self.bad:
            kinds[record["kind"]] += record.get("samples", 1)
        return {
            "source": self.source,
            "holds": self.description,
            "looked_at": self.looked_at,
            "good": self.good,
            "bad": dict(kinds),
            "duplicates": self.duplicates,
            "features": self.features,
            "captions_each": _spread(self.captions),
            "tokens_each": _spread(self.tokens),
            "context_length": self.context_length,
            "captions_too_long": self.too_long,
            "width": _spread([width for width, _ in self.sizes]),
            "height": _spread([height for _, height in self.sizes]),
            "file_bytes": _spread(self.file_bytes),
            "mixing": self.mixing._asdict() if self.mixing else None,
            "weights": self.weights or None,
        }


def dataset_stats(
    config: DataConfig,
    split: str,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    *,
    limit: int,
    thumbnails: int,
    progress: Callable[[Iterable[Read], int], Iterator[Read]],
) -> DatasetStats:
    """Compute statistics of the first `limit` examples of a split."""
    source = ExampleReader(config, split)
    stats = DatasetStats(
        config.source, source.description, context_length=tokenizer.config.context_length
    )
    total = limit if source.count is None else min(limit, source.count)
    seen: set[bytes] = set()
    for read in progress(itertools.islice(source.read(), limit), total):
        stats.looked_at += 1
        try:
            if isinstance(read.example, BadSample):
                raise read.example
            _add(stats, read.example, config, preprocess, tokenizer, seen, thumbnails)
        except BadSample as fault:
            stats.bad.append(fault.record())
    return stats


def stream_mixing(
    config: DataConfig,
    batch: int,
    progress: Callable[[Iterable[Any], int], Iterator[Any]] = lambda items, total: iter(items),
) -> MixingResult | None:
    """Measure the mixing of the first batches of a stream of shards, without reading images.

    Random order is that of all examples of local shards, else of those in the batches. None for
    data with random access, and for groups that cannot be found.
    """
    if not has_shards(config):
        return None
    stream = open_stream(config, batch, seed=0, process_index=0, process_count=1)
    assert isinstance(stream, Shards)
    stream.form.images = False
    batches: list[list[int]] = []
    with ThreadPoolExecutor(READERS) as pool:
        lanes = [stream.lane(number, None, pool) for number in range(stream.lanes)]
        for _ in progress(range(_BATCHES), _BATCHES):
            samples = (next(lane) for lane in lanes for _ in range(batch // stream.lanes))
            batches.append(list(_groups((sample.example for sample in samples), config)))
        for lane in lanes:
            lane.close()
    counts = None
    if not is_remote(config.source):
        own = {"access": "random", "interleave": None, "shuffle": None}
        source = open_source(dataclasses.replace(config, **own), config.train_split)
        total = min(len(source), _SCANNED)
        examples = progress(itertools.islice(scan(source), _SCANNED), total)
        counts = collections.Counter(_groups(examples, config))
    return measure(batches, counts) if all(batches) else None


def weights_description(config: DataConfig) -> str:
    """Describe how often training draws the examples with the weights of their column.

    Raises:
        ConfigError: the data is read as a stream.
        DataError: a wrong weight.
    """
    if streams(config):
        refuse_weights(config)
    return order_of(open_source(config, config.train_split), config).description()


def _groups(examples: Iterable[Any], config: DataConfig) -> Iterator[int]:
    for example in examples:
        with contextlib.suppress(BadSample):
            if isinstance(example, dict):
                yield group_of(example, config)


def difference_hash(image: Image.Image) -> bytes:
    """Compute the difference hash of an image: 64 bits, equal for images that look the same."""
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return np.packbits(small[:, 1:] > small[:, :-1]).tobytes()


def duplicate_key(image: Image.Image) -> bytes:
    """Compute a key for duplicates: difference hash and mean colour (for flat images)."""
    mean = np.asarray(image.resize((1, 1), Image.Resampling.BOX)).astype(np.uint8) // 8
    return hashlib.blake2b(difference_hash(image) + mean.tobytes(), digest_size=8).digest()


def _add(
    stats: DatasetStats,
    example: Example,
    config: DataConfig,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    seen: set[bytes],
    thumbnails: int,
) -> None:
    for name, value in example.items():
        if not name.startswith("\0") and value is not None:
            stats.features.setdefault(name, type(value).__name__)
    captions = captions_of(example, config)
    image = open_image_of(example, config, preprocess, f"example {stats.looked_at - 1}")
    stats.good += 1
    stats.captions.append(len(captions))
    stats.tokens += tokenizer.lengths(captions[0])
    stats.sizes.append(image.size)
    stored = example.get(config.image)
    if isinstance(stored, bytes):
        stats.file_bytes.append(len(stored))
    key = duplicate_key(image)
    stats.duplicates += key in seen
    seen.add(key)
    if len(stats.shown) < thumbnails:
        small = image.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        out = io.BytesIO()
        small.save(out, "JPEG", quality=85)
        stats.shown.append((out.getvalue(), captions))


def _spread(values: list[int]) -> dict[str, float] | None:
    if not values:
        return None
    names = ("min", "median", "p95", "max")
    return dict(zip(names, np.percentile(values, [0, 50, 95, 100]).tolist(), strict=True))
