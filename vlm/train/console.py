"""Where a run speaks: on stderr, from the first process alone."""

import jax
from rich.console import Console, RenderableType

console = Console(stderr=True)


def print_on_first_process(text: RenderableType) -> None:
    """Something for the reader, from the first process alone; above the progress display."""
    if jax.process_index() == 0:
        console.print(text, highlight=False)
