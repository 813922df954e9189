"""Export: programs written, tried, and only then left behind."""

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from etils import epath

from vlm.bundle import Bundle
from vlm.errors import ConfigError
from vlm.exporting import contract
from vlm.exporting.checking import check
from vlm.exporting.programs import programs
from vlm.exporting.storing import Dtype
from vlm.heads.saved import Classifier
from vlm.paths import as_path, is_remote
from vlm.weights.instantiate import Tower
from vlm.weights.new_folder import new_folder

Format = Literal["stablehlo", "onnx", "savedmodel"]  # the last is refused, with its reason


class _Kind(NamedTuple):
    """A format: its module here, and the libraries that it needs."""

    module: str
    needs: tuple[str, ...] = ()


KINDS: dict[str, _Kind] = {
    "stablehlo": _Kind("stablehlo"),
    "onnx": _Kind("onnx_file", ("onnx", "onnxruntime")),
}


@dataclass(frozen=True)
class Exported:
    """An export that was written and tried.

    Attributes:
        folder: where it lies.
        format: of its programs.
        dtype: of their parameters.
        differences: for each program, the largest difference of its output from the model's.

    Example:
        >>> found = vlm.exporting.export(model, folder / "text-tower", tower="text", batches=[2])
        >>> found.differences["text"] < 1e-5
        True
    """

    folder: epath.Path
    format: Format
    dtype: Dtype
    differences: dict[str, float]

    def __repr__(self) -> str:
        found = ", ".join(f"{name} {value:.1e}" for name, value in self.differences.items())
        return f"Exported({self.folder}: {self.format}, {self.dtype}, differences {found})"


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
    """Write towers or a classifier as programs that run without vlm, with all that they need.

    A program takes pixels (n, size, size, 3) uint8 or tokens (n, length) int32, for any n, and
    gives embeddings of unit norm, or scores. Preprocessing, `tokenizer.json` and a page with code
    stand beside. Each program is opened again and compared with the model first.

    Args:
        model: what `vlm.load` gives, in float32.
        folder: a new one.
        format: "stablehlo" (opened by JAX) or "onnx".
        dtype: what parameters are kept as. int8 has a scale for each row and is computed with as
            float32; so is bfloat16 in ONNX, and in StableHLO as bfloat16.
        tower: "both", "image" or "text"; by default both, or none where there is a classifier.
        classifier: of this model; its labels become a part of the program. Zero-shot with all its
            options, a linear probe, Tip-Adapter's cache or a learned prompt; neighbours and prompts
            that each image moves are refused.
        batches: sizes of batches to compare in. None: all from 1 to 33, and some of them in the
            formats that compile each.

    Raises:
        CheckpointError: the folder exists, a program differs from the model (in float32 by more
            than 1e-4), or the format has no form for something that the model does.
        ConfigError: an unknown format or dtype, a library that is missing, a tower that is not
            there.

    Example:
        >>> found = vlm.exporting.export(model, folder / "exported", tower="vision", batches=[2])
        >>> sorted(file.name for file in found.folder.iterdir())
        ['README.md', 'export.json', 'image.stablehlo']
    """
    if format == "savedmodel":
        raise ConfigError(
            "a SavedModel cannot be written: TensorFlow 2.21, the newest, reads StableHLO up to "
            "1.13 and JAX writes a later one, so choose stablehlo or onnx"
        )
    if format not in KINDS:
        raise ConfigError(f"format {format!r} is unknown: choose one of {', '.join(KINDS)}")
    if dtype not in ("float32", "bfloat16", "int8"):
        raise ConfigError(f"dtype {dtype!r} is unknown: choose float32, bfloat16 or int8")
    if batches is not None and (not batches or min(batches) < 1):
        raise ConfigError(f"batches {batches} compares nothing: give sizes of at least 1")
    if is_remote(as_path(folder)):
        raise ConfigError(
            f"{folder} is remote, and an export is tried where it is written: give a "
            "local folder and copy it"
        )
    kind = _module(format)
    sizes = list(kind.BATCHES if batches is None else batches)
    compute = kind.BFLOAT16 if dtype == "bfloat16" else "float32"
    with new_folder(folder) as new:
        made = programs(model, tower, classifier, dtype, compute=compute)
        differences = {}
        for program in made:
            kind.write(program, new)
            differences[program.name] = check(program, kind.opened(program, new), sizes, compute)
        facts = {"kind": format, "dtype": dtype, "batches": sizes, "difference": differences}
        contract.write(new, model, made, classifier, facts, kind.USE)
    return Exported(as_path(folder), format, dtype, differences)


def _module(format: Format) -> Any:
    """The module of a format, once its libraries are known to be there."""
    found = KINDS[format]
    for name in found.needs:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"format {format!r} needs {name}, which is not installed: run "
                f'pip install "vlm-jax[{format}]"'
            )
    return importlib.import_module(f"vlm.exporting.{found.module}")
