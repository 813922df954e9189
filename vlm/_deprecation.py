"""Old names keep working for one minor version, with a DeprecationWarning."""

import importlib
import importlib.machinery
import os
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

# Modules that were renamed. The old names of subpackages now belong to functions: `vlm.train`.
MODULES = {
    "vlm.evaluation.standard": "vlm.evaluation.presets",
    "vlm.adapt": "vlm.adaptation",
    "vlm.evaluate": "vlm.evaluation",
    "vlm.explain": "vlm.explanation",
    "vlm.export": "vlm.exporting",
    "vlm.plan": "vlm.planning",
    "vlm.serve": "vlm.serving",
    "vlm.train": "vlm.training",
}


class RenamedModules:
    """Import hook: `from vlm.train import Trainer` imports `vlm.training`, with a warning."""

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if _renamed_part(name) else None  # type: ignore[arg-type]

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


def renamed(module: str, names: dict[str, str]) -> Callable[[str], Any]:
    """Make a module's `__getattr__` that resolves old names.

    Args:
        module: `__name__` of the module that had the old names.
        names: old name to the full path of the new one, such as "vlm.data.tar.TruncatedFile".
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn(f"{module}.{name}", names[name])
        place, _, new = names[name].rpartition(".")
        return getattr(importlib.import_module(place), new)

    return __getattr__


def environment(name: str, old: str, default: float) -> float:
    """Read a number from the environment variable `name`, or from its old name."""
    if old in os.environ and name not in os.environ:
        warn(f"the environment variable {old}", name, stacklevel=3)
        return float(os.environ[old])
    return float(os.environ.get(name, default))


def warn(old: str, new: str, stacklevel: int = 4) -> None:
    """Warn that `old` is now called `new`."""
    text = f"{old} is renamed to {new}; the old name goes away in the next minor version"
    warnings.warn(text, DeprecationWarning, stacklevel=stacklevel)
