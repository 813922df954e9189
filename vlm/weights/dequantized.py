"""Quantized weights that are multiplied by their scales when they are read."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Shaped

from vlm.errors import CheckpointError, brief
from vlm.weights.files import Tensors


class Grid(NamedTuple):
    """Scales of blocks of a matrix: of its rows, of groups in them, or of tiles."""

    rows: int  # of a block
    columns: int


@dataclass(frozen=True)
class QuantizedTensor:
    """Names of one quantized tensor and of its scales, whose product is the weight."""

    values: str
    scale: str
    zero_point: str | None = None  # subtracted from the values
    grid: Grid | None = None  # None: scales broadcast
    factor: float | None = None  # of the product


class DequantizedTensors:
    """Tensors of a checkpoint, some of which are quantized; these are read as float32.

    The product is that of the stored numbers, without rounding to the type of the scales. Names of
    the parts of a quantized tensor, and those in `unused`, are left out of `shapes`.
    """

    def __init__(
        self,
        tensors: Tensors,
        quantized: Mapping[str, QuantizedTensor],
        unused: Collection[str] = (),
    ):
        self.where = tensors.where
        self._tensors, self._quantized = tensors, quantized
        parts = {
            part
            for q in quantized.values()
            for part in (q.values, q.scale, q.zero_point)
            if part is not None
        }
        self.shapes = {
            name: shape
            for name, shape in tensors.shapes.items()
            if name not in parts and name not in unused
        } | {name: tensors.shapes[q.values] for name, q in quantized.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "..."]:
        if name not in self._quantized:
            return self._tensors.read(name, start, stop)
        q, shape = self._quantized[name], self.shapes[name]
        values = self._tensors.read(q.values, start, stop).astype(np.float32)
        rows = range(*slice(start, stop).indices(shape[0])) if shape else range(0)
        if q.zero_point is not None:
            values -= self._spread(q.zero_point, q.grid, shape, rows)
        values *= self._spread(q.scale, q.grid, shape, rows)
        return values if q.factor is None else values * np.float32(q.factor)

    def _spread(
        self, name: str, grid: Grid | None, shape: tuple[int, ...], rows: range
    ) -> Float32[np.ndarray, "..."]:
        """Read scales, and align them with these rows of the tensor."""
        scale = self._tensors.read(name).astype(np.float32)
        if grid is not None:
            scale = scale.reshape(-(-shape[0] // grid.rows), -1)
            down = np.arange(rows.start, rows.stop) // grid.rows
            return scale[down][:, np.arange(shape[1]) // grid.columns]
        return scale[rows.start : rows.stop] if scale.ndim and len(scale) == shape[0] else scale


def grid_of(where: str, name: str, scale: tuple[int, ...], shape: tuple[int, ...]) -> Grid:
    """Return the blocks of a matrix that scales of one or two axes belong to.

    Raises:
        CheckpointError: they do not divide the matrix.
    """
    down, across = (*scale, 1, 1)[:2]
    rows, columns = shape
    if len(scale) <= 2 and down in (1, rows) and down and across and columns % across == 0:
        return Grid(rows // down, columns // across)
    raise CheckpointError(
        f"{where}: {brief(name)} has scales of shape {scale} for a matrix of {shape}: "
        "vlm reads one scale for the matrix, a row or a group of a row"
    )
