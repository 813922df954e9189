"""Base class of all configs: every field is checked against its declared type at construction."""

import dataclasses
import functools
import numbers
import types
import typing
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from vlm._deprecation import FIELDS, rename_fields, warn
from vlm.config.bounds import check_bounds, check_image_size, check_projection
from vlm.config.code import Code, DataSource, ImportPath, SourceCode
from vlm.errors import ConfigError, brief

T = TypeVar("T", bound="Config")


class _AcceptsOldNames(type):
    """Metaclass that lets constructors take fields by their old names."""

    if not TYPE_CHECKING:  # a type checker takes the signature from the dataclass

        def __call__(cls, *args, **fields):
            return super().__call__(*args, **rename_fields(cls.__name__, fields))


class Config(metaclass=_AcceptsOldNames):
    """Base of the frozen dataclasses that describe a run.

    Construction checks each field against its declared type, its choices and the bounds of
    `vlm.config.bounds`, and then calls `check`. An int becomes a float where one is declared, a
    list a tuple, a mapping a tuple of pairs, a dict of fields the config that is declared, and an
    object its import path (`vlm.config.code`).

    Raises:
        ConfigError: a wrong value; the message names class, field, value and the allowed values.

    Example:
        >>> vlm.OptimizerConfig(name="AdamW")
        Traceback (most recent call last):
            ...
        vlm.errors.ConfigError: ...
    """

    kind: ClassVar[str]  # name in JSON of a class that is one of several

    def __post_init__(self):
        for name, value in vars(self).items():
            checked = _checked(type(self), name, value, f"{type(self).__name__}.{name}")
            object.__setattr__(self, name, checked)
        self.check()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return a field by its old name."""
            cls = type(self).__name__
            new = FIELDS.get(cls, {}).get(name)
            if new is None:
                raise AttributeError(f"{cls!r} object has no attribute {name!r}")
            warn(f"{cls}.{name}", f"{cls}.{new}")
            return getattr(self, new)

    def check(self) -> None:
        """Raise a ConfigError if fields contradict each other; for subclasses to override."""

    def changed(self, *names: str) -> list[str]:
        """Return those of the fields `names` whose value is not the default.

        Example:
            >>> vlm.MeshConfig(fsdp=2).changed("data", "fsdp")
            ['fsdp']
        """
        defaults = _defaults(type(self))
        return [name for name in names if getattr(self, name) != defaults[name]]

    def refuse_unused(self, why: str, *names: str) -> None:
        """Raise a ConfigError if one of the fields `names` is set, because it has no effect.

        Raises:
            ConfigError: with the field, its value, the fix `why`, and the default.
        """
        for name in self.changed(*names):
            raise ConfigError(
                f"{type(self).__name__}.{name} is {getattr(self, name)!r} and has no effect: "
                f"{why}, or leave it at {_defaults(type(self))[name]!r}"
            )

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Convert fields that an older version wrote as JSON to those of this version."""
        return values

    @classmethod
    def from_value(cls: type[T], value: Any, where: str) -> T:
        """Construct a config from the value of a field: a dict of fields, as in JSON."""
        return cls.from_fields(value, where)

    @classmethod
    def from_fields(cls: type[T], values: Any, where: str) -> T:
        """Construct a config from a dict of fields; `where` is its path in messages.

        Raises:
            ConfigError: a field is unknown, missing or wrong; the message names it by its path.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"{where} must be an object of fields, not {values!r}")
        values = rename_fields(cls.__name__, cls.upgraded(values))
        values = {name: value for name, value in values.items() if name != "kind"}
        known = _hints(cls)
        for name in values:
            if name not in known:
                raise ConfigError(f"{where} has no field {name!r}: it has {', '.join(known)}")
        missing = [name for name in known if name not in values and name not in _defaults(cls)]
        if missing:
            raise ConfigError(f"{where} lacks {' and '.join(missing)}: give a value")
        return cls(**{n: _checked(cls, n, value, f"{where}.{n}") for n, value in values.items()})


class VisionTower(Config):
    """Base of the vision towers' configs.

    All have `image_size`, `patch_size` (pixels along each side of a position of the last layer),
    `width`, and `tokens(image_size, training=...)`, the number of positions.
    """

    attends: ClassVar[bool] = False  # has attention over positions

    def check(self) -> None:
        check_image_size(self)

    @property
    def one_size(self) -> str | None:
        """A description of the tower if it takes images of one size only; else None."""
        return None

    @property
    def video_frames(self) -> int | None:
        """The number of frames that a tower of videos takes at once; None for one of images."""
        return None

    @property
    def vectors(self) -> int:
        """The number of vectors of an image; a score is the largest of their cosines."""
        return 1

    def check_space(self, embed_dim: int) -> None:
        """Raise a ConfigError if the tower cannot embed into `embed_dim` dimensions."""
        check_projection(self, embed_dim)


def json_value(value: Any) -> Any:
    """Convert the value of a field to JSON; a dataclass as `to_dict` does."""
    if dataclasses.is_dataclass(value):
        name = getattr(value, "kind", None)
        kind = {} if name is None else {"kind": name}
        fields = dataclasses.fields(value)
        return kind | {field.name: json_value(getattr(value, field.name)) for field in fields}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return str(value) if isinstance(value, Code) else value


def kept_tokens(count: int, masking: float, specials: int = 0) -> int:
    """Number of a text's `count` tokens that remain if a fraction `masking` is dropped.

    Example:
        >>> from vlm.config import kept_tokens
        >>> kept_tokens(64, 0.25)
        48
    """
    return max(1, specials, round(count * (1 - masking)))


def _checked(cls: type[Config], name: str, value: Any, where: str) -> Any:
    """Convert the value of a field to its type, and check its bounds."""
    value = _convert(_hints(cls)[name], value, where)
    check_bounds(cls.__name__, name, value, where)
    return value


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Convert `value` to the type `hint`, or raise a ConfigError that names `where`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is ImportPath:
        return Code.of(value, where)
    if hint is DataSource:
        return SourceCode.of(value, where)
    if hint is Any:
        return _plain(value, where)
    if origin in (typing.Union, types.UnionType):
        return _one_of(args, value, where)
    if origin is Literal:
        if isinstance(value, type):  # such as jnp.bfloat16
            value = value.__name__
        if isinstance(value, str) and value in args:
            return value
        raise ConfigError(f"{where} is {brief(value)}: choose one of {', '.join(map(repr, args))}")
    if origin is tuple:
        return _tuple_of(args, value, where)
    if issubclass(hint, Config):
        return value if isinstance(value, hint) else hint.from_value(value, where)
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            return value if type(value) is float else float(value)
        except OverflowError:
            raise ConfigError(f"{where} is {brief(value)}: it is too large for a float") from None
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return value if type(value) is int else int(value)
    if hint in (str, bool) and isinstance(value, hint):
        return value
    raise ConfigError(f"{where} must be {hint.__name__}, not {brief(value)}")


def _one_of(options: tuple[Any, ...], value: Any, where: str) -> Any:
    """Convert `value` to one of the types of a union."""
    if value is None and types.NoneType in options:
        return None
    options = tuple(option for option in options if option is not types.NoneType)
    kinds = {option.kind: option for option in options if hasattr(option, "kind")}
    if kinds and isinstance(value, dict):
        kind = value.get("kind")
        if not isinstance(kind, str) or kind not in kinds:
            raise ConfigError(f"{where}.kind is {kind!r}: choose one of {', '.join(kinds)}")
        return kinds[kind].from_fields(value, where)
    if kinds and not isinstance(value, options):
        raise ConfigError(
            f"{where} must be an object of fields, or one of "
            f"{', '.join(option.__name__ for option in options)}, not {brief(value)}"
        )
    if kinds:
        return value
    failures = []
    for option in options:
        try:
            return _convert(option, value, where)
        except ConfigError as error:
            failures.append(str(error))
    named = [choice for option in options for choice in typing.get_args(option)]
    if named and ImportPath in options:
        choices = ", ".join(map(repr, named))
        raise ConfigError(
            f"{where} is {brief(value)}: choose one of {choices}, or give an object, or its import "
            "path such as my_parts:name"
        )
    raise ConfigError(failures[0] if isinstance(value, dict) else failures[-1])


def _tuple_of(args: tuple[Any, ...], value: Any, where: str) -> tuple:
    pairs = typing.get_origin(args[0]) is tuple
    if pairs and isinstance(value, dict):
        value = list(value.items())
    if not isinstance(value, list | tuple):
        kind = "mapping or a list of pairs" if pairs else "list"
        raise ConfigError(f"{where} must be a {kind}, not {brief(value)}")
    hints = [args[0]] * len(value) if args[-1] is Ellipsis else args
    if len(hints) != len(value):
        raise ConfigError(f"{where} takes {len(args)} values, not {brief(value)}")
    return tuple(_convert(hint, part, where) for hint, part in zip(hints, value, strict=True))


def _plain(value: Any, where: str) -> Any:
    """Convert a value that a config stores as it is: JSON without objects."""
    if isinstance(value, list | tuple):
        return tuple(_plain(item, where) for item in value)
    if isinstance(value, numbers.Number) and hasattr(value, "item"):  # of NumPy
        value = value.item()  # pyright: ignore[reportAttributeAccessIssue]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(
        f"{where} has {brief(value)}: give numbers, texts, booleans, None, or lists of them, which "
        "a config can store"
    )


@functools.cache
def _hints(cls: type[Config]) -> dict[str, Any]:
    """Return the types of the fields, in their order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # pyright: ignore


@functools.cache
def _defaults(cls: type[Config]) -> dict[str, Any]:
    """Return the defaults of the fields that have one."""
    found = {}
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found
