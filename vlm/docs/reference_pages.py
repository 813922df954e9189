"""Pages of the reference that are generated: commands, public names, config fields and models."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import vlm
from vlm.cli import help
from vlm.cli.commands import BENCH, COMMANDS, DATA, MEASURE, TRAIN, USE
from vlm.config.base import Config
from vlm.config.bounds import bounds_of
from vlm.weights import catalogue


def write(folder: Path) -> None:
    """Write the generated pages, and the tables of others, into the folder `reference`."""
    names, known = public_names(), configs()
    pages = {
        "tables/commands.md": commands(),
        "tables/api.md": packages(names),
        "tables/config.md": config_classes(known),
        "tables/models.md": table(*catalogue.table(catalogue.ENTRIES)),
        "tables/popular_models.md": table(*catalogue.popular()),
    }
    pages |= {f"commands/{page_name(name)}.md": command(name) for name in COMMANDS}
    pages |= {f"api/{package}.rst": api(package, things) for package, things in names.items()}
    pages |= {f"config/{cls.__name__}.rst": config(name, cls) for name, cls in known.items()}
    for path, text in pages.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    lines = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    columns = list(columns)
    return "".join(f"| {' | '.join(row)} |\n" for row in [columns, ["---"] * len(columns), *lines])


def toctree(pages: Iterable[str]) -> str:
    """Return a hidden table of contents for Markdown."""
    return "\n".join(["", "```{toctree}", ":hidden:", "", *pages, "```", ""])


def summary(thing: Any) -> str:
    """Return the first paragraph of a docstring, on one line."""
    return " ".join(inspect.cleandoc(thing.__doc__ or "").split("\n\n")[0].split())


# Commands


def page_name(command: str) -> str:
    """Return the file name of a command's page."""
    return command.replace(" ", "-")


def commands() -> str:
    """Return the tables of commands, by purpose."""
    groups = {"Use a model": USE, "Train": TRAIN, "Data": DATA, "Measure": MEASURE | BENCH}
    text = ""
    for purpose, known in groups.items():
        rows = [[f"[`vlm {n}`](commands/{page_name(n)}.md)", c.summary] for n, c in known.items()]
        text += f"\n## {purpose}\n\n{table(['command', 'purpose'], rows)}"
    return text + toctree(f"commands/{page_name(name)}" for name in COMMANDS)


def command(name: str) -> str:
    """Return the page of one command: its help text, with every option."""
    about = COMMANDS[name].summary
    text = help.render(name, everything=True)
    return f"# vlm {name}\n\n{about[0].upper()}{about[1:]}.\n\n````text\n{text}\n````\n"


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


def packages(names: dict[str, dict[str, Any]]) -> str:
    """Return the table of packages."""
    rows = [[f"[`{p}`](api/{p}.rst)", summary(importlib.import_module(p))] for p in names]
    return table(["package", "contents"], rows) + toctree(f"api/{p}" for p in names)


def api(package: str, things: dict[str, Any]) -> str:
    """Return the page of one package: a table of its names, then each with its docstring."""
    about = inspect.cleandoc(importlib.import_module(package).__doc__ or "")
    lines = [package, "=" * len(package), "", about, ""]
    lines += [f".. py:currentmodule:: {package}", ""]
    lines += [".. autosummary::", "   :nosignatures:", ""]
    lines += [f"   {name}" for name, thing in things.items() if callable_name(thing)]
    lines += [""]
    for name, thing in things.items():
        if is_config(thing):
            continue  # it has a page of its own
        if inspect.isclass(thing):
            lines += [f".. autoclass:: {name}", "   :members:", ""]
        elif isinstance(thing, types.FunctionType):
            lines += [f".. autofunction:: {name}", ""]
        else:
            lines += [f".. py:data:: {name}", f"   :value: {short(thing)}", ""]
            lines += [f"   {comment_of(name)}", ""]
    return "\n".join(lines)


def callable_name(thing: Any) -> bool:
    """Whether the name has a docstring of its own."""
    return inspect.isclass(thing) or isinstance(thing, types.FunctionType)


def comment_of(name: str) -> str:
    """Return the comment above the definition of a constant."""
    typed = r"(?:if TYPE_CHECKING:\n(?: .*\n)+else:\n(?: .*\n)*? +)?"  # for type checkers
    definition = re.compile(rf"((?:^# .*\n)+){typed}{name}\b[^=\n]* = ", re.MULTILINE)
    texts = (path.read_text() for path in sorted(Path(vlm.__file__).parent.rglob("*.py")))
    comment = next(match[1] for text in texts if (match := definition.search(text)))
    return " ".join(comment.replace("# ", "").split())


def short(value: Any) -> str:
    """Return the value of a constant, on one line; the keys of a dict."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: ..." for key in value) + "}"
    return repr(value) if isinstance(value, tuple) else type_text(value)


# Config fields


def is_config(thing: Any) -> bool:
    """Whether the object is a config with fields."""
    return inspect.isclass(thing) and issubclass(thing, Config) and dataclasses.is_dataclass(thing)


def configs() -> dict[str, type]:
    """Return the config classes by the name that they are documented under."""
    found = [
        (f"{package}.{name}", thing)
        for package, things in public_names().items()
        for name, thing in things.items()
        if is_config(thing)
    ]
    return dict(sorted(found, key=lambda pair: (pair[1] is not vlm.Experiment, pair[0])))


def config_classes(known: dict[str, type]) -> str:
    """Return the table of config classes."""
    rows = [[f"[`{n}`](config/{c.__name__}.rst)", summary(c)] for n, c in known.items()]
    return table(["class", "contents"], rows) + toctree(
        f"config/{cls.__name__}" for cls in known.values()
    )


def config(full_name: str, cls: type) -> str:
    """Return the page of a config class: type, default, range and help of each field."""
    from docstring_parser import parse
    from sphinx.ext.napoleon.docstring import GoogleDocstring

    text = inspect.cleandoc(cls.__doc__ or "")
    about = re.sub(r"\n\nArgs:\n.*?(?=\n\n\S|\Z)", "", text, flags=re.DOTALL)
    helps = {param.arg_name: param.description or "" for param in parse(text).params}
    hints = typing.get_type_hints(cls)
    package, _, name = full_name.rpartition(".")
    lines = [name, "=" * len(name), "", f"Public name: `{full_name}`", ""]
    lines += [f".. py:currentmodule:: {package}", f".. py:class:: {name}", ""]
    lines += indent(str(GoogleDocstring(about)).splitlines())
    for field in dataclasses.fields(cls):
        lines += ["", *indent([f".. py:attribute:: {field.name}"])]
        lines += indent([f":type: {type_text(hints[field.name])}"], 2)
        if (default := default_text(field)) is not None:
            lines += indent([f":value: {default}"], 2)
        about = f"{helps.get(field.name, '')}{range_text(name, field.name, hints[field.name])}"
        lines += ["", *indent([" ".join(about.split()).replace("*", r"\*")], 2)]
    return "\n".join([*lines, ""])


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
