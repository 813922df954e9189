"""Log messages of training: logger "vlm.training", on stderr of process 0, or in the notebook.

Its handler prints above the progress display. To send the messages elsewhere, replace the handler,
or remove it and set `propagate`, as for any logger. If the terminal or pipe closes, as an
ssh session does, output is dropped and the run goes on.
"""

import contextlib
import io
import logging
import os
from collections.abc import Iterator

import jax
from rich.console import Console, RenderableType

from vlm.callbacks import in_notebook

STDERR = 2


class _RunConsole(Console):
    def on_broken_pipe(self) -> None:
        drop_output(STDERR)  # rich would exit the process


# In a notebook, lines of stdout are plain text below each other; rich's own display of each line
# has margins, and lines of stderr are red.
_NOTEBOOK = in_notebook()
console = _RunConsole(stderr=not _NOTEBOOK, force_jupyter=False, width=110 if _NOTEBOOK else None)
log = logging.getLogger("vlm.training")


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if jax.process_index() == 0:
            with output_may_close():
                console.print(self.format(record), highlight=False, markup=False)


log.addHandler(_ConsoleHandler())
log.setLevel(logging.INFO)
log.propagate = False


def drop_output(*streams: int) -> None:
    """Send the file descriptors `streams` to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(null, stream)
    os.close(null)


@contextlib.contextmanager
def output_may_close() -> Iterator[None]:
    """Context that writes to the console: if it is closed, later output is dropped."""
    try:
        yield
    except OSError:
        drop_output(STDERR)


def as_text(table: RenderableType) -> str:
    """Render a table or a report as plain text, as wide as the console."""
    Console(file=(text := io.StringIO()), width=console.width).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip("\n").split("\n"))
