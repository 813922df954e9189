"""`vlm train`: from a config to a run folder."""

import os
from typing import Any

from vlm.cli import parse
from vlm.cli.parse import UsageError
from vlm.config import load_config

ABOUT = """\
Train the model that a config describes. Every field of the config is an option; the defaults shown
are those of {config}.

Progress goes to stderr, and the run folder is printed at the end. Ctrl-C saves a checkpoint and
leaves; a second one stops at once. A run goes on with --resume, and with nothing else: its config
is its own.

Examples:
  vlm train configs/openmoji.py
  vlm train configs/openmoji.py --optimizer.learning-rate 3e-4 --epochs 10
  vlm train --resume runs/openmoji"""

USAGE = """\
usage: vlm train CONFIG [--FIELD VALUE ...]
       vlm train --resume RUN

{about}

vlm train CONFIG --help lists the fields."""


def main(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(USAGE.format(about=ABOUT.format(config="that config")))
        if not args:
            raise UsageError("vlm train needs a config, such as configs/openmoji.py")
        return
    first, *rest = args[0].split("=", 1) + args[1:]
    if first == "--resume":
        if len(rest) != 1:
            raise UsageError(
                "a run is resumed as it was: vlm train --resume RUN, with nothing beside it"
                if rest
                else "--resume needs the folder of the run: vlm train --resume RUN"
            )
        return _train(resume=rest[0])
    if first.startswith("-"):
        raise UsageError(f"the config comes first: vlm train CONFIG {first} ...")
    about = ABOUT.format(config=first)
    return _train(parse.options(load_config(first), "vlm train CONFIG", args[1:], about))


def _train(*given: Any, resume: str | None = None) -> None:
    import jax

    from vlm.train.loop import train

    folder = train(*given, resume=resume)
    if jax.process_index() == 0:
        print(os.fspath(folder))
