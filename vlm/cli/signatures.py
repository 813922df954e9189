"""Arguments and options of a function or a dataclass, from its signature and docstring."""

import dataclasses
import inspect
import re
import shlex
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from vlm.config import ImportPath

# Placeholders of texts, by the name of the field or parameter.
PLACEHOLDERS = {
    "calibration": "FILE",
    "class_names": "FILE",
    "config": "CONFIG",
    "data_dir": "FOLDER",
    "init_from": "MODEL",
    "out": "FILE",
    "run_dir": "FOLDER",
    "save": "FILE",
    "source": "SOURCE",
    "stored": "FOLDER",
    "teacher": "MODEL",
    "tokenizer_file": "FILE",
    "trace": "FOLDER",
}
_SECTION = re.compile(r"^(Examples?|Args|Raises|Returns):\n", re.MULTILINE)
_MEANING = re.compile(r"(?:^| )(?:None|Empty|Default): (.+?)\.(?= [A-Z0-9]|$)")


@dataclasses.dataclass(frozen=True)
class Option:
    """An argument or an option of a command.

    Args:
        name: As it is typed, such as --data.cache; for an argument, its placeholder.
        value: Placeholder of the value; empty for a flag or an argument.
        text: Help text.
        default: The default, as it is typed or in words. None: a value is required.
        part: Title of its group on the page.
        alias: A shorter name.
    """

    name: str
    value: str
    text: str
    default: str | None = None
    part: str = "Options"
    alias: str = ""

    @property
    def is_argument(self) -> bool:
        return not self.name.startswith("-")

    @property
    def is_flag(self) -> bool:
        return not (self.is_argument or self.value)


def of_function(function: Callable[..., Any], sections: Mapping[str, str]) -> Iterator[Option]:
    """Yield the options of a function; positional-only parameters are arguments.

    Args:
        sections: Its docstring, by `read_sections`.
    """
    texts, hints = _args(sections), typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        extra = getattr(hints[name], "__metadata__", (None,))[0]  # arg(metavar=..., help=...)
        metavar = getattr(extra, "metavar", None)
        text = texts.get(name) or getattr(extra, "help", None) or ""
        if parameter.kind is parameter.POSITIONAL_ONLY:
            described = _described(text, parameter.default)
            yield Option(metavar or name.upper(), "", *described, "Arguments")
        else:
            typed = f"--{name.replace('_', '-')}"
            value = metavar or _type(hints[name], name)
            yield Option(typed, value, *_described(text, parameter.default, typed))


def of_config(
    config: Any, path: str = "", title: str = "Options", *, unset: bool = False
) -> Iterator[Option]:
    """Yield an option for each field of a dataclass, and of the dataclasses in it.

    Args:
        unset: The dataclass is used if one of its options is given.
    """
    texts, hints = _args(read_sections(type(config))), typing.get_type_hints(type(config))
    parts: list[tuple[str, Any, bool]] = []
    for field in dataclasses.fields(config):
        name, hint, value = f"{path}{field.name}", hints[field.name], getattr(config, field.name)
        optional = [kind for kind in typing.get_args(hint) if dataclasses.is_dataclass(kind)]
        if dataclasses.is_dataclass(value):
            parts.append((name, value, unset))
        elif value is None and optional:
            parts.append((name, optional[0](), True))  # pyright: ignore[reportCallIssue]
        elif hint == tuple[tuple[str, Any], ...]:  # of any type, which a shell does not tell
            continue
        elif _has_dataclass(hint):
            items = [(i, x) for i, x in enumerate(value or ()) if dataclasses.is_dataclass(x)]
            parts += [(f"{name}.{i}", item, unset) for i, item in items]
        else:
            typed = f"--{name.replace('_', '-')}"
            text, default = _described(texts.get(field.name, ""), value, typed)
            if unset and default not in (None, "none") and not isinstance(value, bool):
                default = f"none; {default} with other options of {path[:-1]}"
            yield Option(typed, _type(hint, field.name), text, default, title)
    for name, part, absent in parts:
        summary = _text(read_sections(type(part))[""].partition("\n\n")[0]).removesuffix(".")
        heading = f"{name.replace('_', '-')}: {summary}"
        yield from of_config(part, f"{name}.", heading, unset=absent)


def _has_dataclass(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) or any(map(_has_dataclass, typing.get_args(hint)))


def read_sections(documented: Any) -> dict[str, str]:
    """Split a docstring or a text into its description ("") and its sections by heading."""
    doc = documented if isinstance(documented, str) else documented.__doc__ or ""
    about, *rest = _SECTION.split(inspect.cleandoc(doc))
    found = {"": about.strip()}
    for heading, body in zip(rest[::2], rest[1::2], strict=True):
        found["Examples" if heading == "Example" else heading] = textwrap.dedent(body)
    return found


def _args(sections: Mapping[str, str]) -> dict[str, str]:
    """Return the help of each parameter in the section "Args"."""
    _, *parts = re.split(r"^(\w+):", sections.get("Args", ""), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _text(text: str) -> str:
    """Return a text of a docstring in one line, without markup, as a sentence."""
    text = " ".join(text.replace("`", "").split())
    return text[:1].upper() + text[1:]


def _described(text: str, default: Any, flag: str = "") -> tuple[str, str | None]:
    """Return the help text without the meaning of an empty default, and the default in words."""
    text = _text(text)
    if default is inspect.Parameter.empty:
        return text, None
    if isinstance(default, bool):
        return text, flag if default else f"--no-{flag[2:]}"
    if default is None or default in ((), ""):
        meaning = _MEANING.search(text)
        if meaning is None:
            return text, "none"
        return text.replace(meaning[0], "", 1).strip(), meaning[1]
    values = default if isinstance(default, tuple) else (default,)
    return text, " ".join(_typed(value) for value in values)


def _typed(value: Any) -> str:
    """Return a value as it is typed in a shell."""
    if isinstance(value, tuple):
        return " ".join(map(_typed, value))
    return shlex.quote(f"{value:.12g}" if isinstance(value, float) else str(value))


def _type(hint: Any, name: str) -> str:
    """Return the placeholder of an option with type `hint`; empty for a flag."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _type(args[0], name)
    if origin is Literal:
        return "|".join(args)
    if origin in (typing.Union, types.UnionType):
        return "|".join(_type(arg, name) for arg in args if arg is not types.NoneType)
    if origin is tuple and args[-1] is Ellipsis:
        one = _type(args[0], name)
        return f"{one}..." if one.isalpha() else f"{one} ..."
    if origin is tuple:
        return " ".join(_type(arg, name) for arg in args)
    if hint is ImportPath:
        return "MODULE:NAME"
    return {bool: "", int: "INTEGER", float: "NUMBER"}.get(hint, PLACEHOLDERS.get(name, "TEXT"))
