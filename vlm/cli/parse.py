"""Arguments to calls: typed functions and dataclasses as command lines, wrong usage as a sentence.

tyro makes the parsers and the help. What it says of wrong usage is a box of several lines on
stderr; here that becomes one sentence.
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
    """A command line that cannot be: the exit code is 2, as of other commands."""


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
    """The dataclass `default` with the fields that `args` name, such as `--mesh.fsdp 4`.

    Raises:
        UsageError: an unknown field, or a value that is not of its type.
    """
    return _cli(type(default), prog, args, default=_begun(default, args), description=about)


def _begun(default: T, args: list[str]) -> T:
    """`default` with each part that is None and of which `args` name a field, as it begins."""
    for name, hint in typing.get_type_hints(type(default)).items():
        part: Any = next(
            (kind for kind in typing.get_args(hint) if dataclasses.is_dataclass(kind)), None
        )
        named = any(arg.startswith(f"--{name.replace('_', '-')}.") for arg in args)
        if part is not None and getattr(default, name) is None and named:
            begun: Any = default
            default = dataclasses.replace(begun, **{name: part()})
    return default


def _cli(target: Any, prog: str, args: list[str], **settings: Any) -> Any:
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
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
        raise UsageError(sentence(complaint.getvalue(), prog)) from None
    finally:
        complaint.close()


def sentence(box: str, prog: str) -> str:
    """What a box of tyro's says, in one sentence."""
    lines = [_STYLE.sub("", line).strip("│╭╮╰╯ \n") for line in box.splitlines()]
    sections: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch(r"[─-]{3,}", line):
            sections.append([])
        elif line and not line.startswith("─ "):  # the title, where the edge is drawn by lines
            sections[-1].append(line)
    sections = [section for section in sections if section]
    if not box.lstrip().startswith("╭"):  # in ASCII the title is a section of its own
        sections = sections[1:]
    message, *others = sections or [["the arguments do not fit"]]
    said, rest = " ".join(message), " ".join(line for section in others for line in section)
    mend = f"see {prog} --help"
    if meant := re.findall(r"--[\w.-]+", rest.partition("erhaps you meant")[2]):
        typed = re.search(r"--[\w.-]+", said)
        closest = difflib.get_close_matches(typed[0] if typed else meant[0], meant, 1, cutoff=0)
        mend = f"did you mean {closest[0]}?"
    if wrong := re.search(r"Error parsing (\S+): .*?('[^']*')$", said):
        kind = re.search(rf"{re.escape(wrong[1])} +(\S+)", rest)
        wanted = kind[1] if kind else "something else"
        if wanted.startswith("{None}|"):
            wanted = f"{wanted.removeprefix('{None}|')} or None"
        said = f"{wrong[1]} takes {wanted}, not {wrong[2]}"
    if said.startswith("Missing from"):
        names = [line for line in message if line.isupper()]
        said = f"{prog} needs {' and '.join(names)}" if names else said
    said = said[0].lower() + said[1:].rstrip(".")
    return f"{said}: {mend}"
