"""Console for training: stderr of process 0."""

import jax
from rich.console import Console, RenderableType

console = Console(stderr=True)


def print_on_first_process(text: RenderableType) -> None:
    """Print from process 0 only, above the progress display."""
    if jax.process_index() == 0:
        console.print(text, highlight=False)
