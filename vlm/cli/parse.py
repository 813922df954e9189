"""Command lines of typed functions and dataclasses, by tyro.

tyro reports wrong usage as a box of several lines on stderr. (Its hook for errors is private, and
`get_parser` deprecated.) The box is captured here and becomes one sentence.
"""

import contextlib
import copy
import dataclasses
import functools
import io
import re
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from vlm._deprecation import rename_options
from vlm.cli import help
from vlm.cli.commands import UsageError
from vlm.cli.help import Page

T = TypeVar("T")

_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_SPOKEN = {"INTEGER": "an integer", "NUMBER": "a number"}


def call(function: Callable[..., None], prog: str, args: list[str]) -> None:
    """Call `function` with `args`: positional-only parameters by place, the others as options.

    Raises:
        SystemExit: help was printed.
        UsageError: the arguments do not fit.
    """

    @functools.wraps(function)
    def bound(*values, **options):
        return functools.partial(function, *values, **options)

    _cli(bound, args, lambda: help.of_function(function, prog))()


def options(default: T, prog: str, args: list[str], page: Callable[[T], Page] | None = None) -> T:
    """Return the dataclass `default` with the fields that `args` name, such as `--mesh.fsdp 4`.

    Args:
        page: Makes the help of the command from the defaults.

    Raises:
        SystemExit: help was printed.
        UsageError: an unknown field, or a value of another type.
    """
    default = _with_named_parts(default, args)
    make = page or (lambda config: help.of_config(config, prog))
    return _cli(type(default), args, lambda: make(default), default=default)


def _with_named_parts(default: T, args: list[str]) -> T:
    """Construct each part of `default` that is None if `args` name a field of it."""
    parts: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(type(default)).items():
        prefixes = tuple(f"--{no}{name.replace('_', '-')}." for no in ("", "no-"))
        kinds = [kind for kind in typing.get_args(hint) if dataclasses.is_dataclass(kind)]
        if kinds and getattr(default, name) is None and any(a.startswith(prefixes) for a in args):
            parts[name] = kinds[0]()  # pyright: ignore[reportCallIssue]
    default = copy.copy(default)
    for name, part in parts.items():  # not validated yet: a part may need the options in `args`
        object.__setattr__(default, name, part)
    return default


def asks_for_help(args: list[str]) -> list[int]:
    """Return the positions of the options that ask for help."""
    return [i for i, a in enumerate(args) if re.fullmatch("-h|--help(-all|=.*)?", a)]


def print_help(args: list[str], page: Callable[[], Page]) -> None:
    """Print the help that `args` ask for by --help, --help PATTERN or --help-all, if they do.

    Raises:
        SystemExit: help was printed.
        UsageError: no option matches the pattern.
    """
    asked = asks_for_help(args)
    if not asked:
        return
    option, equals, pattern = args[asked[0]].partition("=")
    following = args[asked[0] + 1 : asked[0] + 2]
    if not equals and option != "--help-all" and following and not following[0].startswith("-"):
        pattern = following[0]
    made, width = page(), help.terminal_width()
    if not pattern:
        print(made.show(width, everything=option == "--help-all"))
        raise SystemExit(0)
    text = made.matching(pattern, width)
    if not text:
        near = made.near(pattern)
        fix = f"did you mean {' or '.join(near)}?" if near else f"see {made.prog} --help-all"
        raise UsageError(f"no option of {made.prog} matches {pattern!r}: {fix}")
    print(text)
    raise SystemExit(0)


def _cli(target: Any, args: list[str], page: Callable[[], Page], **settings: Any) -> Any:
    print_help(args, page)
    args = rename_options(args)
    hints = typing.get_type_hints(target)
    unset = {name.replace("_", "-") for name, hint in hints.items() if hint == bool | None}
    import tyro

    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(
                target,
                args=[_for_tyro(arg, unset) for arg in args],
                config=(tyro.conf.AvoidSubcommands,),
                add_help=False,
                **settings,
            )
    except SystemExit:
        made = page()
        for name in filter(made.lacks, args):
            near = made.near(name)
            fix = f"did you mean {near[0]}?" if near else f"see {made.prog} --help"
            raise UsageError(f"there is no option {name.partition('=')[0]}: {fix}") from None
        raise UsageError(usage_message(stderr.getvalue(), made)) from None


def _for_tyro(arg: str, unset: set[str]) -> str:
    """Convert a flag to its form in tyro, such as `--no-data.cache` to `--data.no-cache`.

    Flags that may be `unset` too have a value there: `--no-scan` is `--scan=False`.
    """
    flag = re.fullmatch(r"--(no-)?([\w-]+)", arg)
    if flag and flag[2] in unset:
        return f"--{flag[2]}={flag[1] is None}"
    match = re.fullmatch(r"--no-([\w.-]+\.)([\w-]+)", arg)
    return f"--{match[1]}no-{match[2]}" if match else arg


def usage_message(box: str, page: Page) -> str:
    """Convert a box of tyro's error output to one sentence with the fix."""
    lines = [_STYLE.sub("", line).strip("│╭╮╰╯ \n") for line in box.splitlines()]
    sections: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch(r"[─-]{3,}", line):
            sections.append([])
        elif line and not line.startswith("─ "):  # the title, if the edge is drawn by lines
            sections[-1].append(line)
    sections = [section for section in sections if section]
    if not box.lstrip().startswith("╭"):  # in ASCII the title is a section
        sections = sections[1:]
    message = sections[0] if sections else ["the arguments do not fit"]
    text, fix = " ".join(message), f"see {page.prog} --help"
    text = text.replace("Unrecognized options", "unexpected arguments")
    if wrong := re.match(r"Error parsing (\S+): .*?(?:from \[(.*?)\]|'([^']*)'$)", text):
        value = (wrong[2] or f"'{wrong[3]}'").replace("', '", " ")
        wanted = {option.name: option.value for option in page.options}.get(
            wrong[1], "another value"
        )
        text = f"{wrong[1]} takes {_SPOKEN.get(wanted, wanted)}, not {value}"
    elif text.startswith("Missing from"):
        required = [o for o in page.options if o.default is None]
        arguments = [option.name for option in required if option.is_argument]
        count = sum(line.isupper() for line in message)
        flags = [o.name for o in required if not o.is_argument]
        options = [name for name in flags if any(line.startswith(name) for line in message)]
        names = arguments[len(arguments) - count :] + options
        text = f"{page.prog} needs {' and '.join(names)}"
    elif text.startswith("Missing value"):
        option = re.search(r"--[\w.-]+", text)
        arguments = " and ".join(o.name for o in page.options if o.is_argument)
        text = f"{option[0]} needs a value" if option else f"{page.prog} needs {arguments}"
    return f"{text[0].lower()}{text[1:].rstrip('.')}: {fix}"
