"""What a process sets before JAX starts: the place for defaults that pay. Yours come first.

JAX and XLA read their environment once, when they are imported, so a door calls this before it
imports a room that does. Compiled programs are kept by `vlm.load` itself.
"""

import os

INFERENCE = {
    # A model that only encodes takes little: leave the rest of a GPU to what else runs there.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}


def prepare_inference() -> None:
    """Set the defaults of commands that load a model and use it."""
    for name, value in INFERENCE.items():
        os.environ.setdefault(name, value)
