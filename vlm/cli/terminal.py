"""Progress bars and status lines on stderr; results go to stdout."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")

CHUNK = 256  # items that are processed before their results are printed


def chunks(items: Iterable[T]) -> Iterator[list[T]]:
    """Split items into lists of at most `CHUNK`, to print results while others are computed."""
    stream = iter(items)
    return iter(lambda: list(itertools.islice(stream, CHUNK)), [])


def _bar(*columns: ProgressColumn, shown: bool = True) -> Progress:
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), *columns)
    hidden = not (shown and console.is_terminal)
    return Progress(*columns, console=console, transient=True, disable=hidden)


def progress(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Iterate over items with a progress bar, if stderr is a terminal."""
    with _bar(MofNCompleteColumn(), TimeRemainingColumn(), shown=total > 1) as bar:
        yield from bar.track(items, total=total, description=what)


@contextlib.contextmanager
def counter(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """Context manager: a function of (done, total or None) that updates a progress bar."""
    with _bar(MofNCompleteColumn()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_status(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr)
