"""Search for the largest batch that fits a slice, in few compilations."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from jax.sharding import AbstractMesh, Mesh

from vlm.config import Experiment
from vlm.errors import ConfigError
from vlm.planning.analytic import analytic_memory
from vlm.planning.compile import CompiledStep, StateBytes, compile_step
from vlm.planning.topology import Topology
from vlm.sharding import batch_ways

TOLERANCE = 0.02  # relative to the answer
ROWS = 8  # granularity of the batch per device
TRIES = {"compiled": 5, "analytic": 30}  # at most


@dataclass(frozen=True)
class LargestBatch:
    """Largest global batch found, its rematerialisation policy, and all batches tried."""

    batch_size: int
    remat: str
    peak: float
    tried: tuple[tuple[int, float, bool], ...]  # (batch, bytes per device, whether it fits)
    basis: Literal["compiled", "analytic"]
    exact: bool  # whether no batch fits that is 2% larger; False: more tries may find a larger one

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"tried": list(self.tried)}


def largest_batch(
    experiment: Experiment,
    topology: Topology,
    mesh: Mesh | AbstractMesh,
    state: StateBytes,
    limit: float,
) -> LargestBatch:
    """Search for the largest batch with full rematerialisation, which allows the most.

    Memory is close to linear in the batch, so the next guess is on the line through two earlier
    tries. Without devices to compile for, memory is estimated.

    Raises:
        ConfigError: not even the smallest batch fits.
    """
    unit = batch_ways(mesh) * ROWS

    def peak(units: int) -> tuple[float, bool]:
        e = dataclasses.replace(
            experiment, batch_size=units * unit, micro_batch_size=None, remat="full"
        )
        if isinstance(mesh, AbstractMesh):
            estimate = analytic_memory(e, topology.chip, state, dict(mesh.shape)).peak
            return estimate, estimate <= limit
        step = compile_step(e, mesh)
        if isinstance(step, CompiledStep):
            return step.peak, step.peak <= limit
        return step.used or math.inf, False

    start = max(1, experiment.batch_size // unit)
    basis: Literal["compiled", "analytic"]
    basis = "analytic" if isinstance(mesh, AbstractMesh) else "compiled"
    units, tried = search(peak, start, limit, TRIES[basis])
    if units is None:
        least = min(tried, key=lambda t: t[1])
        raise ConfigError(
            f"not even a batch of {least[0] * unit} fits {topology.name} "
            f"({least[1] / 2**30:.1f} GiB of {limit / 2**30:.1f}): spread the parameters with "
            "--mesh fsdp=N, choose chips with more memory, or a smaller model"
        )
    largest = {t[0]: t for t in tried}[units]
    all_tried = tuple((u * unit, p, fits) for u, p, fits in tried)
    failing = min((u for u, _, fits in tried if not fits), default=math.inf)
    exact = failing - units <= max(1, TOLERANCE * units)
    return LargestBatch(units * unit, "full", largest[1], all_tried, basis, exact)


def search(
    peak: Callable[[int], tuple[float, bool]], start: int, limit: float, calls: int
) -> tuple[int | None, list[tuple[int, float, bool]]]:
    """Find the largest integer whose `peak` fits, by bracketed secant search.

    Stops when the answer is known to within 2%, or after `calls` calls.
    """
    tried: dict[int, tuple[float, bool]] = {}
    units = start
    while len(tried) < calls and units not in tried:
        tried[units] = peak(units)
        fitting = max((u for u, (_, fits) in tried.items() if fits), default=0)
        failing = min((u for u, (_, fits) in tried.items() if not fits), default=None)
        units = _guess({u: p for u, (p, _) in tried.items()}, fitting, failing, limit)
        near = max(1, math.floor(TOLERANCE * fitting))
        if failing is None:
            units = min(max(units, fitting + near), 8 * fitting)
            continue
        gap = failing - fitting
        if gap <= near:
            break
        # Keep a distance from both ends, so that the bracket shrinks.
        inner = max(1, gap // 8)
        units = min(max(units, fitting + inner), failing - inner)
    fits = [u for u, (_, ok) in tried.items() if ok]
    return max(fits, default=None), [(u, p, ok) for u, (p, ok) in tried.items()]


def _guess(peaks: dict[int, float], fitting: int, failing: int | None, limit: float) -> int:
    """Intersect the limit with the line through two tries: the bracket's ends, or the last two."""
    known = sorted(u for u, p in peaks.items() if math.isfinite(p))
    pair = [u for u in (fitting, failing) if u in known]
    if len(pair) < 2:
        pair = known[-2:] if failing is None else known[:2]
    if len(pair) < 2:
        if not known:
            return (fitting + (failing or 0)) // 2
        share = limit / peaks[known[0]]
        return int(known[0] * (2 * share if share > 1 else 0.8 * share))
    low, high = pair
    slope = (peaks[high] - peaks[low]) / (high - low)
    return int(low + (0.995 * limit - peaks[low]) / slope) if slope > 0 else 2 * high
