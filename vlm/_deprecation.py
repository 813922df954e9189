"""Old names keep working for one minor version, with a DeprecationWarning."""

import os
import warnings
from collections.abc import Callable
from typing import Any


def renamed(module: str, names: dict[str, str]) -> Callable[[str], Any]:
    """Make a module's `__getattr__` that resolves old names.

    Args:
        module: `__name__` of the module that had the old names.
        names: old name to the full path of the new one, such as "vlm.data.tar.TruncatedFile".
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        import importlib

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
