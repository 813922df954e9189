"""JSON form of configs, and loading of `configs/*.py`."""

import importlib.util
import json
import os
import pathlib
import sys
import types
import warnings
from typing import Any, TypeVar

from vlm.config.base import Config, json_value
from vlm.config.training import Experiment
from vlm.errors import ConfigError

T = TypeVar("T", bound=Config)


def to_dict(config: Any) -> dict[str, Any]:
    """Convert the dataclass `config` to plain JSON values; tuples become lists.

    A class that is one of several kinds, such as a vision tower, is named by the key "kind".

    Example:
        >>> from vlm.config import to_dict
        >>> to_dict(vlm.MeshConfig(fsdp=4))
        {'data': -1, 'fsdp': 4, 'tensor': 1, 'gather': None}
    """
    return json_value(config)


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Rebuild a dataclass from `to_dict`'s form.

    Raises:
        ConfigError: a field is unknown or has another type; the message names it by its path.

    Example:
        >>> from vlm.config import from_dict
        >>> from_dict(vlm.MeshConfig, {"fsdp": 4})
        MeshConfig(data=-1, fsdp=4, tensor=1, gather=None)
        >>> from_dict(vlm.MeshConfig, {"fdsp": 4})
        Traceback (most recent call last):
            ...
        vlm.errors.ConfigError: ...
    """
    return cls.from_fields(values, where or cls.__name__)


def check_types(config: T) -> T:
    """Return the same config. Deprecated: a config is checked when it is made.

    Example:
        >>> from vlm.config import check_types
        >>> check_types(vlm.MeshConfig(fsdp=4)).fsdp
        4
    """
    warnings.warn(
        "check_types is not needed: a config is checked when it is made",
        DeprecationWarning,
        stacklevel=2,
    )
    return config


def load_config(path: str | os.PathLike) -> Experiment:
    """Load the `Experiment` that a config file binds to the name `config`, or a run's JSON.

    A config file is imported as a module of its name, so that a run can refer to the code in it.
    Its folder is added to the end of `sys.path`.

    Args:
        path: a file, or the name of a config that is part of vlm, such as "openmoji".

    Raises:
        ConfigError: the file does not exist, fails, or has no Experiment.

    Example:
        >>> vlm.load_config("openmoji").name
        'openmoji'
    """
    path = _config_file(os.fspath(path))
    if path.endswith(".json"):
        try:
            with open(path, encoding="utf-8") as f:
                return from_dict(Experiment, json.load(f))
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from None
    try:
        module = _imported(pathlib.Path(path).absolute())
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path} failed with {type(error).__name__}: {error}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, Experiment):
        raise ConfigError(f"{path} binds no `config` of type vlm.Experiment: add `config = ...`")
    return config


def _imported(path: pathlib.Path) -> types.ModuleType:
    """Run a config file as a module; it is importable unless another module has its name."""
    if os.fspath(path.parent) not in sys.path:
        sys.path.append(os.fspath(path.parent))
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    importable = path.stem.isidentifier() and _origin(path.stem) in (None, os.path.realpath(path))
    if not importable:  # another module has its name
        found.loader.exec_module(module)
        return module
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        if before is not None:
            sys.modules[path.stem] = before
        raise
    return module


def _origin(name: str) -> str | None:
    """Return the file of the module that `import name` gives; None if there is none."""
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return None if found is None else os.path.realpath(found.origin or "")


def shipped_configs() -> dict[str, pathlib.Path]:
    """Return the configs that are part of vlm, by name."""
    package = pathlib.Path(__file__).parent.parent
    # In a wheel they are inside the package, in a clone beside it.
    folders = (package / "configs", package.parent / "configs")
    folder = next((folder for folder in folders if folder.is_dir()), None)
    return {} if folder is None else {file.stem: file for file in sorted(folder.glob("*.py"))}


def _config_file(path: str) -> str:
    """Return the file that `path` names: itself, or a config that is part of vlm."""
    if os.path.isfile(path):
        return path
    shipped = shipped_configs()
    # The documentation writes "configs/openmoji.py", which must work without a clone too.
    name = path.removeprefix("configs/").removesuffix(".py")
    if name in shipped:
        return os.fspath(shipped[name])
    known = f", or a name among {', '.join(shipped)}" if shipped else ""
    raise ConfigError(
        f"there is no config file {path!r}: give the path of a Python file that binds "
        f"`config`{known}"
    )
