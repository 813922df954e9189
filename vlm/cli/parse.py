"""Command lines of typed functions and dataclasses, by tyro.

tyro reports wrong usage as a box of several lines on stderr. (Its hook for errors is private, and
`get_parser` deprecated.) The box is captured here and becomes one sentence.
"""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import re
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from vlm._deprecation import rename_options
from vlm.errors import VlmError

T = TypeVar("T")

_STYLE = re.compile(r"\x1b\[[0-9;]*m")


class UsageError(VlmError):
    """A wrong command line; the exit code is 2."""


def call(function: Callable[..., None], prog: str, args: list[str]) -> None:
    """Call `function` with `args`: positional-only parameters by place, the others as options.

    Raises:
        UsageError: the arguments do not fit.
    """

    @functools.wraps(function)
    def bound(*values, **options):
        return functools.partial(function, *values, **options)

    about = inspect.cleandoc(function.__doc__ or "").split("\n\nArgs:")[0]
    _cli(bound, prog, args, description=about)()


def options(default: T, prog: str, args: list[str], about: str) -> T:
    """Return the dataclass `default` with the fields that `args` name, such as `--mesh.fsdp 4`.

    Raises:
        UsageError: an unknown field, or a value of another type.
    """
    default = _with_named_parts(default, args)
    return _cli(type(default), prog, args, default=default, description=about)


def _with_named_parts(default: T, args: list[str]) -> T:
    """Construct each part of `default` that is None if `args` name a field of it."""
    parts: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(type(default)).items():
        prefix = f"--{name.replace('_', '-')}."
        kinds = [kind for kind in typing.get_args(hint) if dataclasses.is_dataclass(kind)]
        if kinds and getattr(default, name) is None and any(a.startswith(prefix) for a in args):
            parts[name] = kinds[0]()  # pyright: ignore[reportCallIssue]
    return dataclasses.replace(default, **parts)  # pyright: ignore[reportArgumentType]


def _cli(target: Any, prog: str, args: list[str], **settings: Any) -> Any:
    import tyro

    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(
                target,
                prog=prog,
                args=rename_options(args),
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands),
                **settings,
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise UsageError(usage_message(stderr.getvalue(), prog)) from None


def usage_message(box: str, prog: str) -> str:
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
    message, *others = sections or [["the arguments do not fit"]]
    text, rest = " ".join(message), " ".join(line for section in others for line in section)
    fix = f"see {prog} --help"
    if similar := re.findall(r"--[\w.-]+", rest.partition("erhaps you meant")[2]):
        typed = re.search(r"--[\w.-]+", text)
        closest = difflib.get_close_matches(typed[0] if typed else similar[0], similar, 1, cutoff=0)
        fix = f"did you mean {closest[0]}?"
    if wrong := re.search(r"Error parsing (\S+): .*?('[^']*')$", text):
        kind = re.search(rf"{re.escape(wrong[1])} +(\S+)", rest)
        wanted = kind[1] if kind else "another value"
        if wanted.startswith("{None}|"):
            wanted = f"{wanted.removeprefix('{None}|')} or None"
        text = f"{wrong[1]} takes {wanted}, not {wrong[2]}"
    names = [line for line in message if line.isupper()]
    if text.startswith("Missing from") and names:
        text = f"{prog} needs {' and '.join(names)}"
    return f"{text[0].lower()}{text[1:].rstrip('.')}: {fix}"
