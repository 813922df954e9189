"""The help of every command, made from its signature or config and their docstrings.

tyro parses the command lines. Its own help names types by their Python forms, and the help of a
config has hundreds of lines.
"""

import dataclasses
import difflib
import importlib
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vlm.cli import signatures
from vlm.cli.commands import COMMANDS, COMMON
from vlm.cli.signatures import Option, read_sections

MAX_WIDTH = 100
NARROW = 72  # on narrower terminals, help texts begin on their own lines
COLUMN = 32

# A word of a command, with the option before it.
_WORDS = re.compile(r"""(?:--[\w.-]+ (?!-))?(?:[^\s"']|"[^"]*"|'[^']*')+""")


@dataclasses.dataclass(frozen=True)
class Page:
    """The help of one command.

    Args:
        prog: The command, such as "vlm data show".
        usage: Lines of usage.
        sections: Text by heading: "" is the description, "Examples" the examples.
        options: Arguments and options.
        common: Names of the options in the short form. Empty: there is one form, with all options.
    """

    prog: str
    usage: tuple[str, ...]
    sections: Mapping[str, str]
    options: tuple[Option, ...]
    common: tuple[str, ...] = ()

    def show(self, width: int, *, everything: bool = False) -> str:
        """Format the page."""
        options, brief = self.options, bool(self.common) and not everything
        paragraphs = self.sections.get("", "").split("\n\n")
        examples = list(filter(None, self.sections.get("Examples", "").splitlines()))
        footer = f"{self.prog} --help PATTERN shows the options that match."
        if brief:
            known = {option.name: option for option in options}
            arguments = [option for option in options if option.is_argument]
            options = (*arguments, *(known[f"--{name}"] for name in self.common))
            paragraphs, examples = paragraphs[:1], examples[:6]
            footer = (
                f"--help-all shows all {len(self.options)} options, and --help PATTERN those that "
                "match, such as --help templates."
            )
        starts = ("usage: ", *[" " * 7] * len(self.usage))
        text = [
            part
            for start, line in zip(starts, self.usage, strict=False)
            for part in _fill(f"{start}{line}", width, more=" " * 11)
        ]
        for paragraph in paragraphs:
            text += ["", *_fill(paragraph, width)]
        text += ["", "Examples:"]
        for line in examples:
            text += _example(line.strip(), width)
        for title, group in _groups(options, "Common options" if brief else "").items():
            text += ["", *_fill(title if ":" in title else f"{title}:", width)]
            text += [line for option in group for line in _lines(option, width, brief=brief)]
        return "\n".join([*text, "", *_fill(footer, width)])

    def matching(self, pattern: str, width: int) -> str:
        """Format the options whose name or help contains `pattern`; empty if there are none."""
        word, named, other = _plain(pattern), [], []
        for option in self.options:
            if word in _plain(f"{option.alias} {option.name}"):
                named.append(option)
            elif word in _plain(f"{option.value} {option.text} {option.default}"):
                other.append(option)
        if not named + other:
            return ""
        lines = [line for option in named + other for line in _lines(option, width)]
        return "\n".join([f"Options of {self.prog} that match {pattern}:", *lines])

    def lacks(self, typed: str) -> bool:
        """Whether `typed` has the form of an option and is none of this command."""
        name = re.sub(r"^--([\w.-]+\.)?no-", r"--\1", _plain(typed.partition("=")[0]))
        known = {_plain(n) for o in self.options for n in (o.name, o.alias)}
        return (
            bool(re.match(r"--\w", typed)) and not {name, _plain(typed.partition("=")[0])} & known
        )

    def near(self, typed: str) -> list[str]:
        """Return names of options that resemble `typed`, the most similar first."""
        names: dict[str, str] = {}
        for option in self.options:
            name = option.name.removeprefix("--")
            forms = [name, f"no-{name}"] if option.is_flag else [name, option.alias[2:]]
            for form in (*forms, name.rpartition(".")[2], *re.split(r"[.-]", name)):
                names.setdefault(_plain(form), f"--{form}" if form in forms else option.name)
        close = difflib.get_close_matches(_plain(typed.removeprefix("--")), names, 3)
        return list(dict.fromkeys(names[form] for form in close))


def render(name: str, everything: bool = True) -> str:
    """Return the help of a command as plain text of 80 columns.

    Args:
        name: Name of the command, such as "data show".
        everything: Show all options. False: those of `vlm NAME --help`.
    """
    return page(name).show(80, everything=everything)


def page(name: str) -> Page:
    """Return the help page of a command."""
    command = COMMANDS[name]
    module = importlib.import_module(f"vlm.cli.{command.module}")
    if command.takes_list:
        return module.help_page()
    return of_function(getattr(module, command.function), f"vlm {name}")


def terminal_width() -> int:
    """Return the width of the terminal, at most `MAX_WIDTH`; of a pipe, 80."""
    return min(MAX_WIDTH, shutil.get_terminal_size((80, 24)).columns)


def of_function(function: Callable[..., Any], prog: str) -> Page:
    """Make the page of a function: its positional-only parameters are arguments."""
    sections = read_sections(function)
    options = tuple(signatures.of_function(function, sections))
    required = [
        f"{o.name} {o.value}".strip() if o.default is None else f"[{o.name}]"
        for o in options
        if o.is_argument or o.default is None
    ]
    usage = " ".join([prog, *required, "[options]"])
    common = COMMON.get(prog.removeprefix("vlm "), ())
    return Page(prog, (usage,), sections, options, common)


def of_config(
    config: Any,
    prog: str,
    about: Any = None,
    *,
    usage: tuple[str, ...] = (),
    more: Iterable[Option] = (),
    common: tuple[str, ...] = (),
    aliases: Mapping[str, str] | None = None,
) -> Page:
    """Make the page of a command whose options are the fields of a dataclass.

    Args:
        config: The values are the defaults shown.
        prog: The command.
        about: Text with description and examples. None: the docstring of the dataclass.
        usage: Lines of usage.
        more: Arguments and options that are not fields.
        common: See `Page`.
        aliases: Names of fields by shorter names, as they are typed.
    """
    short = {name: alias for alias, name in (aliases or {}).items()}
    options = [
        dataclasses.replace(o, alias=short.get(o.name, "")) for o in signatures.of_config(config)
    ]
    usage = usage or (f"{prog} [options]",)
    return Page(prog, usage, read_sections(about or type(config)), (*more, *options), common)


def _lines(option: Option, width: int, *, brief: bool = False) -> list[str]:
    """Format the option; `brief` keeps the first sentence of its help."""
    names = f"{option.name}/--no-{option.name[2:]}" if option.is_flag else option.name
    heading = f"{option.alias}, {names}" if option.alias else names
    value, text = option.value, option.text
    if brief:
        text = text.partition(". ")[0]
    if len(f"  {heading} {value}") > width and "|" in value:
        text = f"One of {', '.join(value.split('|'))}. {text}"
        value = "CHOICE"
    if option.default is not None:
        text = f"{text.removesuffix('.')} (default: {option.default})"
    heading = f"{heading} {value}".strip()
    column = COLUMN if width >= NARROW else 8
    body = _fill(text, width, " " * column)
    if len(heading) + 2 > width:
        heading = heading.replace("/--no-", "/\n  --no-")
    if len(heading) + 4 > column:
        return [*f"  {heading}".split("\n"), *body]
    return [f"  {heading:<{column - 2}}{body[0].lstrip()}", *body[1:]]


def _groups(options: Iterable[Option], title: str = "") -> dict[str, list[Option]]:
    """Group options by their part of the page, or under one title."""
    groups: dict[str, list[Option]] = {}
    for option in options:
        part = title if title and not option.is_argument else option.part
        groups.setdefault(part, []).append(option)
    return groups


def _plain(text: str) -> str:
    return text.lower().replace("_", "-")


def _fill(text: str, width: int, indent: str = "", more: str = "") -> list[str]:
    """Break a text into lines between words; `more` is the indentation of all but the first."""
    wrapper = textwrap.TextWrapper(width, indent, indent + more)
    wrapper.break_long_words = wrapper.break_on_hyphens = False
    return wrapper.wrap(text.replace("`", "")) or [indent]


def _example(command: str, width: int) -> list[str]:
    """Break a command into lines that a shell joins."""
    lines = [" "]
    for word in _WORDS.findall(command):
        if len(f"{lines[-1]} {word} \\") > width and lines[-1].strip():
            lines[-1] += " \\"
            lines.append("     ")
        lines[-1] += f" {word}"
    return lines
