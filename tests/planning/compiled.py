"""Compiled plans beside published throughputs on TPUs: python tests/planning/compiled.py

`fit.py` counts every row by hand, so that kinds of chip compare, and the shares are fitted to that.
Here the steps are compiled, as `vlm plan` does, and held against the same rows; minutes each.
"""

import sys
import time

from fit import predicted
from published import JUDGED

from vlm.chips import CHIPS
from vlm.errors import VlmError
from vlm.planning import plan


def main() -> None:
    inside, fitting = 0, 0
    for row in JUDGED:
        if CHIPS[row.chip].platform != "tpu":
            continue
        began, by_hand = time.perf_counter(), predicted(row)
        start = f"{row.chip:4} {row.chips:3} {row.model[:30]:30} {row.measured:7.1f}"
        try:
            found = plan(row.experiment, row.topology, loss=False)
        except VlmError as error:
            print(f"{start}: {error}", flush=True)
            continue
        if not found.fits or found.prediction is None:
            refusal = found.refusal or f"{found.memory.peak / 2**30:.1f} GiB of each device"
            print(f"{start}: compiled, it does not fit: {refusal[:90]}", flush=True)
            continue
        compiled = found.prediction.pairs_per_second_per_chip
        fitting += 1
        inside += row.measured in compiled
        print(
            f"{start}: compiled {compiled.low:7.1f} to {compiled.high:7.1f}, by hand "
            f"{by_hand.low:7.1f} to {by_hand.high:7.1f}"
            f"{'' if row.measured in compiled else '  outside'}"
            f" ({time.perf_counter() - began:.0f} s)",
            flush=True,
        )
    print(f"{inside} of {fitting} that fit are inside the compiled plan's range")


if __name__ == "__main__":
    sys.exit(main())
