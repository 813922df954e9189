"""Pages of the reference that are generated: commands, public names, config fields and models."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
import types
import typing
from pathlib import Path
from typing import Any

import vlm
from vlm.cli import COMMANDS
from vlm.config.base import Config
from vlm.config.bounds import bounds_of
from vlm.weights import catalogue

GITHUB = "https://github.com/vlm-jax/vlm/blob/main"


def write(folder: Path) -> None:
    """Write the generated pages into the folder `reference` of the sources."""
    names = public_names()
    pages = {"models.md": models(), "config.rst": configs(names), "commands.md": commands()}
    pages |= {f"commands/{page_name(name)}.md": command(name) for name in COMMANDS}
    pages["api.md"] = api_index(names)
    pages |= {f"api/{module}.rst": api(module, names) for module in names}
    for path, text in pages.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


def page_name(command: str) -> str:
    """Return the file name of a command's page."""
    return command.replace(" ", "-")


def commands() -> str:
    """Return the list of commands."""
    lines = ["# Commands", "", "`vlm COMMAND --help` prints the same in a terminal.", ""]
    lines += ["| command | purpose |", "|---|---|"]
    lines += [
        f"| [`vlm {n}`](commands/{page_name(n)}.md) | {c.summary} |" for n, c in COMMANDS.items()
    ]
    return "\n".join([*lines, "", toctree(f"commands/{page_name(n)}" for n in COMMANDS)])


def command(name: str) -> str:
    """Return the page of one command: its help text, with every option."""
    try:
        from vlm.cli.help import render
    except ImportError:  # until the help pages are here
        render = _printed_help
    summary = COMMANDS[name].summary
    text = re.sub(r"\x1b\[[0-9;]*m", "", render(name, everything=True)).strip()
    heading = f"# vlm {name}\n\n{summary[0].upper()}{summary[1:]}."
    return f"{heading}\n\n````text\n{text}\n````\n"


def _printed_help(name: str, everything: bool) -> str:
    import contextlib
    import io

    from vlm.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main([*name.split(), "--help"])
    return printed.getvalue()


def models() -> str:
    """Return the table of known public checkpoints."""
    columns, rows = catalogue.table(catalogue.ENTRIES)
    lines = [
        "# Models and licences",
        "",
        "These public checkpoints are known by name; `vlm models` prints the same table and filters",
        "it. `vlm.load` reads many others: see [Choose a model](../howto/choose-a-model.md). Accuracy",
        "is zero-shot top-1 on ImageNet as published by the authors or open_clip; `vlm models NAME`",
        "shows the source.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
    ]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([*lines, ""])


def toctree(names: typing.Iterable[str]) -> str:
    """Return a hidden table of contents for Markdown."""
    return "\n".join(["```{toctree}", ":hidden:", "", *names, "```", ""])


def heading(title: str) -> list[str]:
    """Return a page title for reStructuredText."""
    return [title, "=" * len(title), ""]


# Public names


def public_names() -> dict[str, dict[str, Any]]:
    """Return the public names and their objects by package; each object once."""
    inside = [m.name for m in pkgutil.iter_modules(vlm.__path__) if m.ispkg and m.name != "cli"]
    found: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for package in ["vlm", *(f"vlm.{name}" for name in inside)]:
        module = importlib.import_module(package)
        objects = {name: getattr(module, name) for name in dir(module) if name[0] != "_"}
        found[package] = {
            name: thing
            for name, thing in objects.items()
            if not inspect.ismodule(thing) and id(thing) not in seen
        }
        seen |= {id(thing) for thing in found[package].values()}
    return {package: names for package, names in found.items() if names}


def api_index(names: dict[str, dict[str, Any]]) -> str:
    """Return the list of packages."""
    lines = [
        "# Python names",
        "",
        "Names of `vlm` are the stable interface. Names of a subpackage are public too, and may",
        "change in a minor version with a `DeprecationWarning`. The test suite runs every example.",
        "",
        "| package | contents |",
        "|---|---|",
    ]
    for package in names:
        about = (importlib.import_module(package).__doc__ or "").split("\n\n")[0].strip()
        lines.append(f"| [`{package}`](api/{package}.rst) | {' '.join(about.split())} |")
    return "\n".join([*lines, "", toctree(f"api/{package}" for package in names)])


def api(package: str, names: dict[str, dict[str, Any]]) -> str:
    """Return the page of one package: a table of its names, then each with its docstring."""
    module = importlib.import_module(package)
    lines = [*heading(package), inspect.cleandoc(module.__doc__ or ""), ""]
    lines += [f".. py:module:: {package}", f".. currentmodule:: {package}", ""]
    things = names[package]
    lines += [".. autosummary::", "   :nosignatures:", ""]
    lines += [f"   {name}" for name, thing in things.items() if callable_name(thing)]
    lines += [""]
    for name, thing in things.items():
        if is_config(thing):
            continue  # on the page of config fields
        if inspect.isclass(thing):
            lines += [f".. autoclass:: {name}", "   :members:", ""]
        elif isinstance(thing, types.FunctionType):
            lines += [f".. autofunction:: {name}", ""]
        else:
            lines += [f".. py:data:: {name}", f"   :value: {short(thing)}", ""]
    return "\n".join(lines)


def callable_name(thing: Any) -> bool:
    """Whether the name has a docstring of its own."""
    return inspect.isclass(thing) or isinstance(thing, types.FunctionType)


def short(value: Any) -> str:
    """Return the value of a constant, on one line; the keys of a dict."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: ..." for key in value) + "}"
    return repr(value) if isinstance(value, tuple) else type_text(value)


# Config fields


def is_config(thing: Any) -> bool:
    """Whether the object is a config with fields."""
    return inspect.isclass(thing) and issubclass(thing, Config) and dataclasses.is_dataclass(thing)


def configs(names: dict[str, dict[str, Any]]) -> str:
    """Return the page of all config classes and their fields."""
    lines = [
        *heading("Config fields"),
        "A config file binds ``config`` to a `vlm.Experiment`. Each field below is an option of",
        "``vlm train`` too: ``optimizer.learning_rate`` is ``--optimizer.learning-rate``. A value of",
        "another type or outside its range is an error that names the field.",
        "",
    ]
    classes = [(p, n, c) for p, things in names.items() for n, c in things.items() if is_config(c)]
    classes.sort(key=lambda row: row[1] != "Experiment")
    for package, name, cls in classes:
        lines += [name, "-" * len(name), "", f".. py:currentmodule:: {package}", ""]
        lines += config_class(name, cls)
    return "\n".join(lines)


def config_class(name: str, cls: type) -> list[str]:
    """Return a config class with the type, default, range and help of each field."""
    from docstring_parser import parse
    from sphinx.ext.napoleon import Config as Napoleon
    from sphinx.ext.napoleon import GoogleDocstring

    text = inspect.cleandoc(cls.__doc__ or "")
    about = re.sub(r"\n\nArgs:\n.*?(?=\n\n\S|\Z)", "", text, flags=re.DOTALL)
    settings = Napoleon(napoleon_use_rtype=False)
    helps = {param.arg_name: param.description or "" for param in parse(text).params}
    hints = typing.get_type_hints(cls)
    lines = [f".. py:class:: {name}", ""]
    lines += indent(str(GoogleDocstring(about, settings)).splitlines())
    for field in dataclasses.fields(cls):
        lines += ["", *indent([f".. py:attribute:: {field.name}"])]
        lines += indent([f":type: {type_text(hints[field.name])}"], 2)
        if (default := default_text(field)) is not None:
            lines += indent([f":value: {default}"], 2)
        about = f"{helps.get(field.name, '')}{range_text(name, field.name, hints[field.name])}"
        lines += ["", *indent([" ".join(about.split()).replace("*", r"\*")], 2)]
    return [*lines, ""]


def indent(lines: list[str], times: int = 1) -> list[str]:
    """Return the lines, indented for reStructuredText."""
    return ["   " * times + line if line else "" for line in lines]


def range_text(cls: str, name: str, hint: Any) -> str:
    """Return the range of a numeric field as a sentence; empty if there is none to speak of."""
    kinds = [hint, *typing.get_args(hint)]
    kinds += [part for kind in kinds for part in typing.get_args(kind)]
    kind = next((kind for kind in kinds if kind in (int, float)), None)
    if kind is None:
        return ""
    bounds = bounds_of(cls, name, kind)
    return "" if bounds.high >= 1e9 and bounds.low < 0 else f" Range: {bounds}."


def default_text(field: dataclasses.Field) -> str | None:
    """Return the default of a field as source; None if it must be given."""
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return f"{getattr(field.default_factory, '__name__', 'a new value')}()"
    return None


def type_text(hint: Any) -> str:
    """Return a type as an annotation reads, without the modules of names."""
    if hint is type(None):
        return "None"
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(map(repr, args))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_text(part) for part in args)
    if origin is not None and args:
        parts = ["..." if part is Ellipsis else type_text(part) for part in args]
        return f"{getattr(origin, '__name__', origin)}[{', '.join(parts)}]"
    return getattr(hint, "__name__", str(hint))
