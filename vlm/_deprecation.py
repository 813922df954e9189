"""Old names keep working for one minor version, with a DeprecationWarning."""

import functools
import importlib
import importlib.machinery
import os
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

# Modules that were renamed. The old names of subpackages now belong to functions: `vlm.train`.
MODULES = {
    "vlm.heads.identity": "vlm.heads.model_identity",
    "vlm.evaluation.standard": "vlm.evaluation.presets",
    "vlm.adapt": "vlm.adaptation",
    "vlm.evaluate": "vlm.evaluation",
    "vlm.explain": "vlm.explanation",
    "vlm.export": "vlm.exporting",
    "vlm.plan": "vlm.planning",
    "vlm.serve": "vlm.serving",
    "vlm.train": "vlm.training",
}

# Config fields that were renamed: class name, then old name to new name.
FIELDS = {
    "AugmentConfig": {"lines": "morphology"},
    "DataConfig": {"keep": "filters", "lanes": "interleave"},
    "Experiment": {"image_sizes": "resolution_schedule"},
    "MixturePart": {"keep": "filters"},
    "OptimizerConfig": {"nonfinite": "on_nonfinite", "start_decay": "l2_sp"},
    "PreprocessConfig": {"crop_offset": "crop_rounding", "fill": "pad_value"},
}
# Options of the command line: those of the renamed fields, and a few more.
OPTIONS = {old: new for fields in FIELDS.values() for old, new in fields.items()} | {
    "anew": "rebuild",
    "none": "other_label",
    "unroll": "no_scan",
}


class RenamedModules:
    """Import hook: `from vlm.train import Trainer` imports `vlm.training`, with a warning."""

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("vlm.") or not _renamed_part(name):
            return None
        return importlib.machinery.ModuleSpec(name, self)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None  # the default

    def exec_module(self, module: types.ModuleType) -> None:
        name = module.__name__
        old = _renamed_part(name)
        new = MODULES[old] + name.removeprefix(old)
        warn(name, new, stacklevel=3)
        sys.modules[name] = importlib.import_module(new)


def _renamed_part(name: str) -> str:
    """Return the start of a module's name that was renamed, or an empty string."""
    return next((old for old in MODULES if f"{name}.".startswith(f"{old}.")), "")


def renamed(
    module: str, names: dict[str, str], otherwise: Callable[[str], Any] | None = None
) -> Callable[[str], Any]:
    """Make a module's `__getattr__` that resolves old names.

    Args:
        module: `__name__` of the module that had the old names.
        names: old name to the full path of the new one, such as "vlm.data.tar.TruncatedFile".
        otherwise: the module's own `__getattr__`, for all other names.
    """

    def __getattr__(name: str) -> Any:
        if name in names:
            warn(f"{module}.{name}", names[name])
            place, _, new = names[name].rpartition(".")
            return getattr(importlib.import_module(place), new)
        if otherwise is not None:
            return otherwise(name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__


def rename_fields(cls: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the config class `cls` with old names replaced.

    An old name takes precedence: `dataclasses.replace(config, lanes=4)` passes both names.
    """
    for old, new in FIELDS.get(cls, {}).items():
        if old in values:
            warn(f"{cls}.{old}", f"{cls}.{new}", stacklevel=4)
            others = {name: value for name, value in values.items() if name != old}
            values = others | {new: values[old]}
    return values


def rename_arguments(**names: str) -> Callable[[F], F]:
    """Decorate a function so that it accepts keyword arguments by their old names too.

    Example:
        >>> @rename_arguments(none="other_label")
        ... def segment(image, other_label=None): ...
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in names.keys() & kwargs.keys():
                warn(f"{function.__qualname__}({old}=)", f"{names[old]}=")
                kwargs[names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call  # pyright: ignore[reportReturnType]

    return decorate


def rename_options(args: list[str]) -> list[str]:
    """Return command-line arguments with old options, and `--tower image`, replaced."""
    found: list[str] = []
    for arg in args:
        option, equals, value = arg.partition("=")
        path, dot, name = option.removeprefix("--").rpartition(".")
        new = OPTIONS.get(name.replace("-", "_"))
        if option.startswith("--") and new is not None:
            renamed_option = f"--{path}{dot}{new.replace('_', '-')}"
            warn(f"the option {option}", renamed_option)
            arg = f"{renamed_option}{equals}{value}"
        if arg == "--tower=image" or (arg == "image" and found[-1:] == ["--tower"]):
            warn("the option --tower image", "--tower vision")
            arg = arg.replace("image", "vision")
        found.append(arg)
    return found


def renamed_method(old: str, new: str) -> Callable[..., Any]:
    """Make a method that calls the one named `new`; `old` is "Class.method"."""

    def method(self: Any, *args: Any, **options: Any) -> Any:
        warn(old, f"{old.partition('.')[0]}.{new}", stacklevel=3)
        return getattr(self, new)(*args, **options)

    return method


def environment(name: str, old: str, default: float) -> float:
    """Read a number from the environment variable `name`, or from its old name."""
    if old in os.environ and name not in os.environ:
        warn(f"the environment variable {old}", name)
        return float(os.environ[old])
    return float(os.environ.get(name, default))


def warn(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn that `old` is now called `new`."""
    text = f"{old} is renamed to {new}; the old name goes away in the next minor version"
    warnings.warn(text, DeprecationWarning, stacklevel=stacklevel)
