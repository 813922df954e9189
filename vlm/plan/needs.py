"""What a run asks for besides its step: time, money, checkpoints, and what each host must bring."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from vlm.config import Experiment
from vlm.data.workers import buffered_batches
from vlm.inputs.preprocess import Preprocess
from vlm.plan.calibration import Range
from vlm.plan.topology import Topology

# Estimates, by which a plan warns; `vlm bench data` measures the first two on the data at hand.
DECODES = 250  # images a second and core: a JPEG of 512 x 384 opened and resized to 224 (measured)
SAMPLE_BYTES = 60_000  # of such a JPEG and its captions, as img2dataset writes them
BUCKET_RATE = 250e6  # bytes per second that a host writes to a bucket
THREADS = 2  # of a core: clouds count threads


@dataclass(frozen=True)
class Needs:
    """Of a whole run, and of each of its hosts."""

    hosts: int
    examples: int | None  # of the config; None: its length is in epochs
    seconds: Range | None  # of training alone
    chip_hours: Range | None
    cost: Range | None  # at the price asked about
    checkpoint_bytes: int
    checkpoint_seconds: float  # to write it, beside training
    host_memory: int  # bytes: a copy of the state that is being written, and batches ahead
    host_memory_limit: float | None
    images_per_second: Range  # of each host, as are the following
    bytes_per_second: Range
    cores: Range
    cores_limit: float | None

    @property
    def data_bound(self) -> bool:
        """Whether a host has too few cores to feed its chips."""
        return self.cores_limit is not None and self.cores.middle > self.cores_limit

    def to_dict(self) -> dict[str, Any]:
        found = {
            k: [v["low"], v["high"]] if isinstance(v, dict) else v for k, v in asdict(self).items()
        }
        return found | {"basis": "estimate", "data_bound": self.data_bound}


def needs(
    experiment: Experiment,
    topology: Topology,
    step_seconds: Range,
    state_bytes: int,
    price: float | None = None,
) -> Needs:
    """What `experiment` asks of a slice on which a step takes so long.

    Args:
        state_bytes: parameters, optimizer and averages, whole.
        price: of a chip for an hour, in whatever money.
    """
    e, chip = experiment, topology.rated_chip
    hosts = math.ceil(topology.chips / chip.box)
    steps = run_steps(e)
    seconds = step_seconds.scaled(steps) if steps else None
    if e.seconds:
        seconds = Range(e.seconds, e.seconds)
    hours = seconds.scaled(topology.chips / 3600) if seconds else None
    images = step_seconds.inverse(e.batch_size / hosts)
    image = Preprocess(e.preprocess).image_bytes
    batch = e.batch_size / hosts * (image + 4 * e.model.text.context_length)
    workers = e.data.workers
    ahead = buffered_batches(workers, e.data.prefetch)[1] if workers else e.data.prefetch + 2
    return Needs(
        hosts=hosts,
        examples=steps * e.batch_size if steps else None,
        seconds=seconds,
        chip_hours=hours,
        cost=hours.scaled(price) if hours and price is not None else None,
        checkpoint_bytes=state_bytes,
        checkpoint_seconds=state_bytes / hosts / min(BUCKET_RATE, chip.network * chip.box),
        host_memory=round(state_bytes / hosts + ahead * batch),
        host_memory_limit=chip.host_memory,
        images_per_second=images,
        bytes_per_second=images.scaled(SAMPLE_BYTES),
        cores=images.scaled(1 / DECODES),
        cores_limit=chip.cores / THREADS if chip.cores else None,
    )


def run_steps(experiment: Experiment) -> int | None:
    """The steps of a run, where its config says them without its data."""
    if experiment.steps:
        return experiment.steps
    if experiment.examples:
        return math.ceil(experiment.examples / experiment.batch_size)
    return None
