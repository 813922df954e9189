"""`vlm models`: the known public checkpoints, as a table to choose from."""

import dataclasses
import json as jsonlib
import sys
from typing import Annotated

from rich.console import Console
from rich.table import Table
from tyro.conf import arg

from vlm.cli import parse
from vlm.weights import catalogue


def main(args: list[str]) -> None:
    parse.call(models, "vlm models", args)


def models(name: Annotated[str | None, arg(metavar="NAME")] = None, /, json: bool = False) -> None:
    """List the known public checkpoints, or show one.

    Accuracy is zero-shot top-1 on ImageNet as its authors or open_clip published it; `vlm models
    NAME` says where. Whatever `vlm.load` reads loads, listed here or not.

    Examples:
      vlm models
      vlm models google/siglip2-base-patch16-256

    Args:
        name: of a checkpoint in the table.
        json: print JSON.
    """
    entries = catalogue.ENTRIES if name is None else (catalogue.find(name),)
    if json:
        values = [dataclasses.asdict(entry) for entry in entries]
        print(jsonlib.dumps(values if name is None else values[0], indent=2, ensure_ascii=False))
        return
    # Piped, a table has no width to fit: rows stay whole for whatever reads them.
    console = Console(width=None if sys.stdout.isatty() else 200)
    if name is not None:
        table = Table(show_header=False)
        for field, value in dataclasses.asdict(entries[0]).items():
            table.add_row(field.replace("_", " "), "" if value is None else str(value))
    else:
        columns, rows = catalogue.table()
        table = Table()
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row)
    console.print(table)
