"""ONNX: a file that onnxruntime, browsers and phones open (extra `onnx`)."""

from collections.abc import Callable

import numpy as np
from etils import epath

from vlm.exporting.programs import Program

BFLOAT16 = "float32"  # what bfloat16 parameters are computed with: few runtimes have kernels
BATCHES = tuple(range(1, 34))  # that are tried

USE = """\
import onnxruntime
{program} = onnxruntime.InferenceSession("{program}.onnx")
({output},) = {program}.run(None, {{"{input}": {input}}})"""

LARGEST = 2**31 - 2**24  # bytes: a file of Protocol Buffers ends below two GiB


def write(program: Program, folder: epath.Path) -> None:
    """Write `NAME.onnx`, and for a large model its parameters beside it, as `NAME.onnx.data`."""
    from vlm.exporting.onnx_graph import from_jax
    from vlm.exporting.onnx_rules import RULES

    names = (program.input, program.output)
    model = from_jax(program.function, program.row, program.dtype, names, RULES)
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > LARGEST:
        _move_out(model, folder / f"{program.name}.onnx.data")
    (folder / f"{program.name}.onnx").write_bytes(model.SerializeToString())


def _move_out(model, file: epath.Path) -> None:
    """The parameters of a model in a file of their own."""
    import onnx

    place = 0
    with file.open("wb") as out:
        for tensor in model.graph.initializer:
            data = tensor.raw_data
            facts = {"location": file.name, "offset": place, "length": len(data)}
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in facts.items():
                tensor.external_data.add(key=key, value=str(value))
            out.write(data)
            place += len(data)


def opened(program: Program, folder: epath.Path) -> Callable[[np.ndarray], np.ndarray]:
    """The file as a function of a batch."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / f"{program.name}.onnx"))
    return lambda rows: np.asarray(session.run(None, {program.input: rows})[0])
