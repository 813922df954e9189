"""The proof that an exported program computes what the model does."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from vlm.errors import CheckpointError
from vlm.exporting.programs import Program

# Of an embedding of unit norm, or of a score. The reference computes with the same parameters, so
# that only the order of sums differs; bfloat16 rounds each of them to 8 bits.
_LIMITS = {"float32": 1e-4, "bfloat16": 0.05}


def check(
    program: Program,
    run: Callable[[np.ndarray], np.ndarray],
    batches: Sequence[int],
    compute: Literal["float32", "bfloat16"],
) -> float:
    """The largest difference from the original, over batches of these sizes.

    Raises:
        CheckpointError: the program computes something else than JAX does with the parameters as
            they are kept, or the shape is another.
    """
    largest = 0.0
    for count in batches:
        rows = np.resize(np.arange(len(program.examples)), count)  # again from the first
        found, wanted = run(program.examples[rows]), program.reference[rows]
        if found.shape != wanted.shape:
            raise CheckpointError(
                f"the exported {program.name} gives {found.shape} for {count} rows and the model "
                f"{wanted.shape}, so nothing was written: choose another format"
            )
        difference = float(np.abs(found - wanted).max())
        if not difference <= _LIMITS[compute]:  # nor NaN
            raise CheckpointError(
                f"the exported {program.name} differs from the model by {difference:.1e} in a "
                f"batch of {count}, above {_LIMITS[compute]:.0e}, so nothing was written: "
                "choose another format"
            )
        largest = max(largest, float(np.abs(found - program.expected[rows]).max()))
    return largest
