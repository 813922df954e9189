"""The proof that an exported program computes what the model does."""

from collections.abc import Callable, Sequence

import numpy as np

from vlm.errors import CheckpointError
from vlm.export.programs import Program
from vlm.export.storing import Dtype

# Of an embedding of unit norm, or of a score. Rounding explains no more; what is above is a fault.
LIMITS: dict[Dtype, float] = {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.1}


def check(
    program: Program,
    run: Callable[[np.ndarray], np.ndarray],
    batches: Sequence[int],
    dtype: Dtype,
) -> float:
    """The largest difference from the original, over batches of these sizes.

    Raises:
        CheckpointError: it is above the limit of `dtype`, or the shape is another.
    """
    largest = 0.0
    for count in batches:
        rows = np.resize(np.arange(len(program.examples)), count)  # again from the first
        found, wanted = run(program.examples[rows]), program.expected[rows]
        if found.shape != wanted.shape:
            raise CheckpointError(
                f"the exported {program.name} gives {found.shape} for {count} rows and the model "
                f"{wanted.shape}, so nothing was written: choose another format"
            )
        largest = max(largest, float(np.abs(found - wanted).max()))
        if not largest <= LIMITS[dtype]:  # nor NaN
            raise CheckpointError(
                f"the exported {program.name} differs from the model by {largest:.1e} in a batch "
                f"of {count}, above {LIMITS[dtype]:.0e} for {dtype}, so nothing was written: "
                f"choose another format{'' if dtype == 'float32' else ' or dtype'}"
            )
    return largest
