"""Export of towers and classifiers, kept only if the written program matches the model."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from etils import epath

from vlm.bundle import Bundle
from vlm.errors import CheckpointError, ConfigError, check_choice
from vlm.exporting import contract, immich
from vlm.exporting.programs import ExportProgram, programs
from vlm.exporting.storing import Dtype
from vlm.heads.saved import Classifier
from vlm.paths import as_path, is_remote
from vlm.weights.instantiate import Tower
from vlm.weights.new_folder import new_folder

# The last is rejected with the reason.
Format = Literal["stablehlo", "onnx", "immich", "savedmodel"]

# Module of each format, and the libraries that it needs.
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "stablehlo": ("stablehlo", ()),
    "onnx": ("onnx_file", ("onnx", "onnxruntime")),
    "immich": ("immich", ("onnx", "onnxruntime")),
}

# Largest difference of an embedding of unit norm, or of a score. The reference has the same
# parameters, so only the order of sums differs; bfloat16 rounds each sum to 8 bits.
_LIMITS = {"float32": 1e-4, "bfloat16": 0.05}


@dataclass(frozen=True)
class Exported:
    """A written and verified export.

    Attributes:
        folder: of the programs.
        format: of the programs.
        dtype: of their parameters.
        differences: largest difference of each program's output from the model's.

    Example:
        >>> result = vlm.exporting.export(model, folder / "text-tower", tower="text", batches=[2])
        >>> result.differences["text"] < 1e-5
        True
    """

    folder: epath.Path
    format: Format
    dtype: Dtype
    differences: dict[str, float]

    def __repr__(self) -> str:
        differences = ", ".join(f"{name} {value:.1e}" for name, value in self.differences.items())
        return f"Exported({self.folder}: {self.format}, {self.dtype}, differences {differences})"


def export(
    model: Bundle,
    folder: epath.PathLike,
    format: Format = "stablehlo",
    *,
    dtype: Dtype = "float32",
    tower: Tower | None = None,
    classifier: Classifier | None = None,
    batches: Sequence[int] | None = None,
) -> Exported:
    """Write towers or a classifier as programs that run without vlm.

    A program takes pixels (n, size, size, 3) uint8 or tokens (n, length) int32 for any n, and
    returns embeddings of unit norm or scores. The folder also has the preprocessing settings,
    `tokenizer.json` and a page with code. Each program is read back and compared with the model.

    Args:
        model: a float32 bundle of `vlm.load`.
        folder: output folder; it must not exist.
        format: "stablehlo" (run by JAX), "onnx", or "immich" (ONNX in the layout of Immich).
        dtype: stored type of parameters. int8 has a scale per row and is computed in float32;
            bfloat16 is computed in float32 by ONNX, and in bfloat16 by StableHLO.
        tower: "both", "vision" or "text"; by default both, or none with a classifier.
        classifier: of this model; the program includes its labels. Zero-shot with all its options,
            a linear probe, Tip-Adapter's cache or a learned prompt. Nearest neighbours and
            image-conditional prompts are rejected.
        batches: batch sizes to compare. None: 1 to 33, or some of them for formats that compile
            each size.

    Raises:
        CheckpointError: the folder exists, a program differs from the model (in float32 by more
            than 1e-4), or the format does not support an operation of the model.
        ConfigError: an unknown format or dtype, a missing library, a missing tower.

    Example:
        >>> result = vlm.exporting.export(model, folder / "exported", tower="vision", batches=[2])
        >>> sorted(file.name for file in result.folder.iterdir())
        ['README.md', 'export.json', 'image.stablehlo']
    """
    if format == "savedmodel":
        raise ConfigError(
            "a SavedModel cannot be written: TensorFlow 2.21, the newest, reads StableHLO up to "
            "1.13 and JAX writes a later one, so choose stablehlo or onnx"
        )
    check_choice("format", format, KINDS)
    check_choice("dtype", dtype, get_args(Dtype))
    if batches is not None and (not batches or min(batches) < 1):
        raise ConfigError(f"batches {batches} compares nothing: give sizes of at least 1")
    if is_remote(as_path(folder)):
        raise ConfigError(
            f"{folder} is remote, and an export is verified where it is written: give a "
            "local folder and copy it"
        )
    kind = _module(format)
    sizes = list(kind.BATCHES if batches is None else batches)
    compute = kind.BFLOAT16 if dtype == "bfloat16" else "float32"
    planes = format == "immich"
    if planes:
        immich.check(model, tower, classifier)
    with new_folder(folder) as new:
        exported = programs(model, tower, classifier, dtype, compute=compute, planes=planes)
        differences = {}
        for program in exported:
            kind.write(program, new)
            differences[program.name] = _largest_difference(
                program, kind.opened(program, new), sizes, compute
            )
        if planes:
            immich.write_settings(new, model)
            return Exported(as_path(folder), format, dtype, differences)
        facts = {"kind": format, "dtype": dtype, "batches": sizes, "difference": differences}
        contract.write(new, model, exported, classifier, facts, kind.USE)
    return Exported(as_path(folder), format, dtype, differences)


def _module(format: Format) -> Any:
    """Import the module of a format.

    Raises:
        ConfigError: one of its libraries is not installed.
    """
    module, needs = KINDS[format]
    for name in needs:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"format {format!r} needs {name}, which is not installed: run "
                'pip install "vlm-jax[onnx]"'
            )
    return importlib.import_module(f"vlm.exporting.{module}")


def _largest_difference(
    program: ExportProgram,
    run: Callable[[np.ndarray], np.ndarray],
    batches: Sequence[int],
    compute: Literal["float32", "bfloat16"],
) -> float:
    """Compare a written program with the model, over batches of these sizes.

    Raises:
        CheckpointError: the output differs from JAX's with the same stored parameters, or has
            another shape.
    """
    largest = 0.0
    for count in batches:
        rows = np.resize(np.arange(len(program.examples)), count)  # repeats the examples
        output, wanted = run(program.examples[rows]), program.reference[rows]
        if output.shape != wanted.shape:
            problem = f"gives {output.shape} for {count} rows and the model {wanted.shape}"
        elif not (difference := float(np.abs(output - wanted).max())) <= _LIMITS[compute]:  # or NaN
            problem = (
                f"differs from the model by {difference:.1e} in a batch of {count}, above "
                f"{_LIMITS[compute]:.0e}"
            )
        else:
            largest = max(largest, float(np.abs(output - program.expected[rows]).max()))
            continue
        raise CheckpointError(
            f"the exported {program.name} {problem}, so nothing was written: choose another format"
        )
    return largest
