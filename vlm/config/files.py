"""Configs as JSON and back, and the loading of `configs/*.py`."""

import dataclasses
import json
import os
import pathlib
import runpy
import types
import typing
from typing import Any, Literal, TypeVar

from vlm.config.towers import from_older_form
from vlm.config.training import Experiment
from vlm.errors import ConfigError

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass `config` as plain JSON values; tuples become lists.

    A class that is one of several kinds, such as an image tower, says which under "kind".

    Example:
        >>> from vlm.config import to_dict
        >>> to_dict(vlm.MeshConfig(fsdp=4))
        {'data': -1, 'fsdp': 4, 'tensor': 1}
    """
    return _plain(config)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        name = getattr(value, "kind", None)
        kind = {} if name is None else {"kind": name}
        return kind | {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Rebuild a dataclass from `to_dict`'s form.

    Raises:
        ConfigError: a field is unknown or has another type; the message names it by its path.

    Example:
        >>> from vlm.config import from_dict
        >>> from_dict(vlm.MeshConfig, {"fsdp": 4})
        MeshConfig(data=-1, fsdp=4, tensor=1)
        >>> from_dict(vlm.MeshConfig, {"fdsp": 4})
        Traceback (most recent call last):
            ...
        vlm.errors.ConfigError: ...
    """
    where = where or cls.__name__
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be an object of fields, not {values!r}")
    if hasattr(cls, "kind"):
        values = {name: value for name, value in values.items() if name != "kind"}
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    for name in values:
        if name not in known:
            raise ConfigError(f"{where} has no field {name!r}: it has {', '.join(known)}")
    converted = {
        name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()
    }
    try:
        return cls(**converted)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint` asks for, or a ConfigError that names `where`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # pyright: ignore[reportArgumentType]
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        if all(hasattr(option, "kind") for option in options):
            return _of_a_kind(options, value, where)
        for option in options[:-1]:
            try:
                return _convert(option, value, where)
            except ConfigError:
                continue
        return _convert(options[-1], value, where)
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{where} is {value!r}: choose one of {', '.join(map(repr, args))}")
    if origin is tuple:
        if isinstance(value, list | tuple):
            inner = [args[0]] * len(value) if args[-1] is Ellipsis else args
            if len(inner) == len(value):
                return tuple(_convert(a, v, where) for a, v in zip(inner, value, strict=True))
            raise ConfigError(f"{where} takes {len(args)} values, not {value!r}")
        raise ConfigError(f"{where} must be a list, not {value!r}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any or (isinstance(value, hint) and (hint is bool or not isinstance(value, bool))):
        return value
    raise ConfigError(f"{where} must be {hint.__name__}, not {value!r}")


def _of_a_kind(options: list[type], value: Any, where: str) -> Any:
    """The one of several classes whose kind `value` names."""
    if isinstance(value, dict) and "kind" not in value:
        value = from_older_form(value)
    kinds = {option.kind: option for option in options}
    kind = value.get("kind") if isinstance(value, dict) else None
    if isinstance(value, dict) and kind not in kinds:
        raise ConfigError(f"{where}.kind is {kind!r}: choose one of {', '.join(kinds)}")
    return from_dict(kinds.get(kind, options[0]), value, where)


def check_types(config: T) -> T:
    """The same config, after a check of every field against its declared type.

    Example:
        >>> from vlm.config import check_types
        >>> check_types(vlm.MeshConfig(fsdp=4)).fsdp
        4
    """
    return from_dict(type(config), to_dict(config))


def load_config(path: str | os.PathLike) -> Experiment:
    """The `Experiment` that a config file binds to the name `config`; also reads a run's JSON.

    Args:
        path: a file, or the bare name of a config that comes with vlm, such as "openmoji".

    Raises:
        ConfigError: no such file, an error inside it, or no Experiment in it.

    Example:
        >>> vlm.load_config("openmoji").name
        'openmoji'
    """
    path = _config_file(os.fspath(path))
    if path.endswith(".json"):
        try:
            with open(path, encoding="utf-8") as f:
                return from_dict(Experiment, json.load(f))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from None
    try:
        names = runpy.run_path(path)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path} failed with {type(error).__name__}: {error}") from error
    config = names.get("config")
    if not isinstance(config, Experiment):
        raise ConfigError(f"{path} binds no `config` of type vlm.Experiment: add `config = ...`")
    return check_types(config)


def shipped_configs() -> dict[str, pathlib.Path]:
    """The configs that come with vlm, by name."""
    package = pathlib.Path(__file__).parent.parent
    # In a wheel they lie inside the package, in a clone beside it.
    folders = (package / "configs", package.parent / "configs")
    folder = next((folder for folder in folders if folder.is_dir()), None)
    return {} if folder is None else {file.stem: file for file in sorted(folder.glob("*.py"))}


def _config_file(path: str) -> str:
    """The file that `path` names: itself, or a config that comes with vlm."""
    if os.path.isfile(path):
        return path
    shipped = shipped_configs()
    # "configs/openmoji.py" is what the documentation says, and it works without a clone too.
    name = path.removeprefix("configs/").removesuffix(".py")
    if name in shipped:
        return os.fspath(shipped[name])
    known = f", or a name among {', '.join(shipped)}" if shipped else ""
    raise ConfigError(
        f"there is no config file {path!r}: give the path of a Python file that binds "
        f"`config`{known}"
    )
