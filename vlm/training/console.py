"""Log messages of training: logger "vlm.training", on stderr of process 0.

Its handler prints above the progress display. To send the messages elsewhere, replace the handler,
or remove it and set `propagate`, as for any logger.
"""

import io
import logging

import jax
from rich.console import Console, RenderableType

console = Console(stderr=True)
log = logging.getLogger("vlm.training")


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if jax.process_index() == 0:
            console.print(self.format(record), highlight=False, markup=False)


log.addHandler(_ConsoleHandler())
log.setLevel(logging.INFO)
log.propagate = False


def as_text(table: RenderableType) -> str:
    """Render a table or a report as plain text, as wide as the console."""
    Console(file=(text := io.StringIO()), width=console.width).print(table)
    return text.getvalue().rstrip("\n")
