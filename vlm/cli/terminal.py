"""What a command shows while it works (on stderr) and what it says (on stdout)."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

CHUNK = 256  # items that are worked on before their results are shown


def chunks(items: Iterable[T]) -> Iterator[list[T]]:
    """The items in lists of at most `CHUNK`, so that results come while the rest is worked on."""
    stream = iter(items)
    return iter(lambda: list(itertools.islice(stream, CHUNK)), [])


def progress(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """The items as they pass, counted on the terminal; silent where stderr is not one."""
    console = Console(file=sys.stderr)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    shown = console.is_terminal and total > 1
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        yield from bar.track(items, total=total, description=what)


@contextlib.contextmanager
def counter(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A function that shows how many of how many are done (None: unknown), on a terminal."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def print_status(text: str) -> None:
    """A line for the reader of the terminal, beside the results."""
    print(text, file=sys.stderr)
