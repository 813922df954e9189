"""TensorFlow's SavedModel by jax2tf (extra `savedmodel`), for TF Serving and its relatives."""

from collections.abc import Callable

import numpy as np
from etils import epath

from vlm.export.programs import Program

BFLOAT16 = "bfloat16"  # what bfloat16 parameters are computed with
PLATFORMS = ("cpu", "cuda", "tpu")
BATCHES = (1, 2, 7, 33)  # that are tried: each is compiled

USE = """\
import tensorflow as tf
{program} = tf.saved_model.load("{program}.savedmodel")
{program} = {program}.signatures["serving_default"]
{output} = {program}({input}=tf.constant({input}))["{output}"].numpy()"""


def write(program: Program, folder: epath.Path) -> None:
    """Write the folder `NAME.savedmodel`, whose batch may be of any size."""
    import tensorflow as tf
    from jax.experimental import jax2tf

    call = jax2tf.convert(
        program.function,
        polymorphic_shapes=[f"(batch, {', '.join(map(str, program.row))})"],
        with_gradient=False,
        native_serialization_platforms=PLATFORMS,
    )
    rows = tf.TensorSpec((None, *program.row), tf.as_dtype(program.dtype), name=program.input)
    module = tf.Module()
    module.call = tf.function(
        lambda rows: {program.output: call(rows)}, autograph=False, input_signature=[rows]
    )
    tf.saved_model.save(module, str(folder / f"{program.name}.savedmodel"), signatures=module.call)


def opened(program: Program, folder: epath.Path) -> Callable[[np.ndarray], np.ndarray]:
    """The folder as a function of a batch."""
    import tensorflow as tf

    loaded = tf.saved_model.load(str(folder / f"{program.name}.savedmodel"))
    call = loaded.signatures["serving_default"]
    return lambda rows: call(**{program.input: tf.constant(rows)})[program.output].numpy()
