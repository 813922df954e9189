"""ONNX files, for onnxruntime, browsers and phones (extra `onnx`)."""

from collections.abc import Callable

import numpy as np
from etils import epath

from vlm.exporting.programs import ExportProgram

BFLOAT16 = "float32"  # compute type of bfloat16 parameters: few runtimes have bfloat16 kernels
BATCHES = tuple(range(1, 34))  # to verify

USE = """\
import onnxruntime
{program} = onnxruntime.InferenceSession("{program}.onnx")
({output},) = {program}.run(None, {{"{input}": {input}}})"""

LARGEST = 2**31 - 2**24  # bytes: a Protocol Buffers file is limited to 2 GiB


def write(program: ExportProgram, folder: epath.Path) -> None:
    """Write `NAME.onnx`, and the parameters of a large model to `NAME.onnx.data`."""
    write_as(program, folder, program.name, (program.input, program.output))


def write_as(program: ExportProgram, folder: epath.Path, file: str, names: tuple[str, str]) -> None:
    """Write a program as `FILE.onnx`, with these names of its input and output."""
    import onnx

    from vlm.exporting.onnx_graph import from_jax
    from vlm.exporting.onnx_rules import RULES

    model = from_jax(program.function, program.row, program.dtype, names, RULES)
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    onnx.save_model(
        model,
        str(folder / f"{file}.onnx"),
        save_as_external_data=size > LARGEST,
        location=f"{file}.onnx.data",
        size_threshold=1024,  # bytes: runtimes need shapes in the file itself
    )


def opened(program: ExportProgram, folder: epath.Path) -> Callable[[np.ndarray], np.ndarray]:
    """Load the file as a function of a batch."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / f"{program.name}.onnx"))
    return lambda rows: np.asarray(session.run(None, {program.input: rows})[0])
