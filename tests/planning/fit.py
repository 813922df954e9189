"""Fit the shares of the published rates to half of the published throughputs; judge on the rest.

    python tests/planning/fit.py

Prints each row beside the plan's range, and the shares that are written in
vlm/planning/calibration.py. All estimates are analytic, so that chips are comparable.
"""

import itertools
import math
import sys

import jax
from published import JUDGED, ROWS, Published

from vlm.planning.analytic import analytic_traffic
from vlm.planning.calibration import SHARES, calibration_of
from vlm.planning.compile import abstract_state, state_bytes
from vlm.planning.prediction import plan_mesh
from vlm.planning.roofline import Roofline, analytic_roofline
from vlm.planning.topology import parse_topology


def roofline(row: Published) -> Roofline:
    """By hand, at the published rates; memory is not looked at."""
    e, topology = row.experiment, parse_topology(row.topology)
    mesh = plan_mesh(e, topology, compiled=False)
    state = abstract_state(e)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
    sent = analytic_traffic(e, whole, dict(mesh.shape))
    return analytic_roofline(e, topology, state_bytes(state, mesh), sent, dict(mesh.shape))


def predicted(row: Published):
    """The range of samples per second per chip."""
    seconds = roofline(row).predicted(calibration_of(row.chip))
    return seconds.inverse(row.batch / row.chips)


def fit(chips: set[str], memory: float) -> tuple[float, float]:
    """The arithmetic share that suits the fitted rows of these chips, and the error that is left.

    The error is the mean square of the logarithm of predicted over measured.
    """
    rows = [(roofline(r), r) for r in JUDGED if r.chip in chips and not r.held_out]
    best = (0.0, math.inf)
    for arithmetic in (k / 100 for k in range(10, 100)):
        error = 0.0
        for line, row in rows:
            operations = line.compute / arithmetic + line.waiting / memory
            seconds = max(operations, line.launches) + line.exposed
            error += math.log(seconds * row.measured * row.chips / row.batch) ** 2 / len(rows)
        best = min(best, (arithmetic, error), key=lambda pair: pair[1])
    return best


GROUPS = ({"v3"}, {"v4"}, {"a100", "a100-40"}, {"h100"})


def main() -> None:
    for platform in ("tpu", "gpu"):
        groups = GROUPS[:2] if platform == "tpu" else GROUPS[2:]
        for memory in (1.0, 0.7, 0.6, 0.5, 0.4, 0.3):
            found = [fit(chips, memory) for chips in groups]
            total = sum(
                e * sum(r.chip in g and not r.held_out for r in JUDGED)
                for (_, e), g in zip(found, groups, strict=True)
            )
            text = ", ".join(
                f"{'/'.join(sorted(g))} {a:.2f} (error {math.sqrt(e):.2f})"
                for (a, e), g in zip(found, groups, strict=True)
            )
            print(f"{platform}: memory {memory:.2f}: {text}; all {total:.3f}")
    rows = sorted(ROWS, key=lambda r: (r.software == "eager", r.chip, r.held_out))
    inside = {True: [], False: []}
    for row in rows:
        if row.chip not in SHARES:
            continue
        expected = predicted(row)
        if row.software != "eager":
            inside[row.held_out].append(row.measured in expected)
        half = "listed" if row.software == "eager" else "held" if row.held_out else "fitted"
        print(
            f"{half:6} {row.chip:8} {row.chips:4} {row.model[:32]:32} {row.measured:7.1f}, "
            f"expected {expected.low:7.1f} to {expected.high:7.1f}"
            f"{'' if row.measured in expected else '  outside'}"
        )
    for held, name in ((False, "fitted"), (True, "held out")):
        print(f"{name}: {sum(inside[held])} of {len(inside[held])} inside")
    every = list(itertools.chain(*inside.values()))
    print(f"all: {sum(every)} of {len(every)} inside")


if __name__ == "__main__":
    sys.exit(main())
