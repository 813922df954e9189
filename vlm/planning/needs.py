"""Requirements of a run: time, cost, checkpoints, and memory, bandwidth and cores of hosts."""

import math
from dataclasses import dataclass
from typing import Any

from vlm.config import DataConfig, Experiment
from vlm.config.batch_sizes import mean_pairs
from vlm.data.workers import buffered_batches
from vlm.inputs.preprocess import Preprocess
from vlm.planning.calibration import Range, as_values
from vlm.planning.topology import Topology

# Estimates for warnings; `vlm bench data` measures the first two on your data.
DECODES = 250  # images/s per core: a 512 x 384 JPEG decoded and resized to 224 (measured)
SAMPLE_BYTES = 60_000  # bytes of such a JPEG and its captions, as img2dataset writes them
BUCKET_RATE = 250e6  # bytes/s that a host writes to a bucket
THREADS = 2  # per core: clouds count threads


@dataclass(frozen=True)
class Needs:
    """Requirements of a run and of each of its hosts."""

    hosts: int
    examples: int | None  # None: the length is in epochs
    seconds: Range | None  # of training only
    chip_hours: Range | None
    cost: Range | None  # at the given price
    checkpoint_bytes: int
    checkpoint_seconds: float  # to write it during training
    host_memory: int  # bytes: state being written and prefetched batches
    host_memory_limit: float | None
    images_per_second: Range  # per host, as the following
    bytes_per_second: Range
    cores: Range
    cores_limit: float | None

    @property
    def data_bound(self) -> bool:
        """Whether a host has too few cores to feed its chips."""
        return self.cores_limit is not None and self.cores.middle > self.cores_limit

    def to_dict(self) -> dict[str, Any]:
        return as_values(self) | {"basis": "estimate", "data_bound": self.data_bound}


def batches_ahead(data: DataConfig) -> int:
    """Number of batches that the pipeline reads ahead and holds on a host."""
    return buffered_batches(data.workers, data.prefetch)[1] if data.workers else data.prefetch + 2


def needs(
    experiment: Experiment,
    topology: Topology,
    step_seconds: Range,
    state_bytes: int,
    price: float | None = None,
) -> Needs:
    """Estimate the requirements of a run, given its step time on a slice.

    Args:
        state_bytes: unsharded bytes of the train state that a checkpoint stores.
        price: price of a chip-hour, in any currency.
    """
    e, chip = experiment, topology.rated_chip
    hosts = math.ceil(topology.chips / chip.box)
    pairs = mean_pairs(e) * e.super_batch_size / e.batch_size  # read in a step
    steps = e.steps  # None if only the data gives the length
    if not steps and e.examples:
        steps = math.ceil(e.examples / pairs)
    seconds = step_seconds.scaled(steps) if steps else None
    if e.seconds:
        seconds = Range(e.seconds, e.seconds)
    hours = seconds.scaled(topology.chips / 3600) if seconds else None
    images = step_seconds.inverse(pairs / hosts)
    image = Preprocess(e.preprocess).image_bytes
    batch = e.super_batch_size / hosts * (image + 4 * e.model.text.context_length)
    return Needs(
        hosts=hosts,
        examples=round(steps * pairs) if steps else None,
        seconds=seconds,
        chip_hours=hours,
        cost=hours.scaled(price) if hours and price is not None else None,
        checkpoint_bytes=state_bytes,
        checkpoint_seconds=state_bytes / hosts / min(BUCKET_RATE, chip.network * chip.box),
        host_memory=round(state_bytes / hosts + batches_ahead(e.data) * batch),
        host_memory_limit=chip.host_memory,
        images_per_second=images,
        bytes_per_second=images.scaled(SAMPLE_BYTES),
        cores=images.scaled(1 / DECODES),
        cores_limit=chip.cores / THREADS if chip.cores else None,
    )
