"""`vlm models`: list the known public checkpoints, or show the card of a model."""

import dataclasses
import json as jsonlib
import re
import sys
from typing import Annotated, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tyro.conf import arg

from vlm.cli import options
from vlm.cli.parse import UsageError
from vlm.errors import VlmError
from vlm.paths import as_path
from vlm.weights import catalogue


def models(
    name: Annotated[str | None, arg(metavar="NAME")] = None,
    /,
    max_params: str | None = None,
    licence: str | None = None,
    language: str | None = None,
    update: bool = False,
    json: options.Json = False,
) -> None:
    """List the known public checkpoints: all, those that match the options, or one.

    Accuracy is zero-shot top-1 on ImageNet as published by the authors or open_clip; `vlm models
    NAME` shows the source. `vlm.load` reads many checkpoints that are not in this list.

    Of a Hub id or a local folder, NAME also shows the model card: licence, data, languages, base
    model and evaluation, as its authors wrote them.

    Commands and `vlm.load` accept both names. A short name is that of the architecture, and means
    its most accurate checkpoint with an open licence; others add data, resolution or patch size.
    A checkpoint is downloaded once, and its commit is used until --update fetches the newest.

    Examples:
      vlm models
      vlm models siglip2-base
      vlm models me/my-model
      vlm models EVA02-B-16 --update
      vlm models --max-params 400M --licence open --language de

    Args:
        name: a checkpoint of the list, by its name, short name, or name without owner; any Hub id;
            or a folder.
        max_params: most parameters of both towers together, such as 400M or 1.5B.
        licence: a licence, such as MIT; "open" is any that permits all uses of the weights.
        language: a language code, such as de; multilingual models match all languages.
        update: download the newest commit of NAME, any model of the Hub; later commands use it.
    """
    if update:
        _update(name)
        return
    if name is not None and (max_params or licence or language):
        raise UsageError("vlm models takes a NAME or options, not both: leave one out")
    if name is not None:
        _show(name, json)
        return
    most = None if max_params is None else _millions(max_params)
    entries = catalogue.choose(max_parameters=most, licence=licence, language=language)
    unknown = catalogue.undecided(max_parameters=most, licence=licence, language=language)
    if json:
        values = [dataclasses.asdict(entry) for entry in entries]
        print(jsonlib.dumps(values, indent=2, ensure_ascii=False))
        return
    console = _console()
    columns, rows = catalogue.table(entries)
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"Commands use {catalogue.default_model().short_name} without --model.")
    if unknown:
        names = ", ".join(entry.name for entry in unknown)
        console.print(f"Left out, because a requested fact is unknown: {names}.")


def _console() -> Console:
    # In a pipe, rows must not wrap.
    return Console(width=None if sys.stdout.isatty() else 260)


def _show(name: str, json: bool) -> None:
    """Print the facts of one model: those of the list, and those of its card."""
    from vlm.weights.card_facts import read_card, shown_facts
    from vlm.weights.hub import is_hub_id

    local = as_path(name).exists()
    entry = None if local else catalogue.resolve(name)
    in_card = local or is_hub_id(name)
    if entry is None and not in_card:
        catalogue.find(name)  # raises an error with similar names
    card: dict[str, Any] | None = None
    problem = ""
    if in_card:
        try:
            card = read_card(name)
        except VlmError as error:
            if entry is None:
                raise
            problem = str(error)  # the facts of the list need no network
    facts = {} if card is None else shown_facts(card)
    values: dict[str, Any] = {} if entry is None else dataclasses.asdict(entry)
    if json:
        if not local:
            values["commit"] = _commit(name if entry is None else entry.name)
        if in_card:
            values["card"] = None if card is None else facts
        print(jsonlib.dumps(values, indent=2, ensure_ascii=False))
        return
    table = Table(show_header=False)
    for field, value in values.items():
        table.add_row(field.replace("_", " "), "unknown" if value is None else str(value))
    if not local:
        commit = _commit(name if entry is None else entry.name)
        newest = f"vlm models {name} --update fetches the newest"
        table.add_row("commit here", f"{commit} ({newest})" if commit else "not downloaded by vlm")
    start = "" if entry is None else "card: "
    for field, text in facts.items():
        table.add_row(escape(start + field), escape(text))
    if in_card and not facts:
        nothing = "has no metadata" if card is not None else "has none"
        table.add_row("card", escape(problem or f"{name} {nothing}"))
    elif entry is not None and not in_card:
        table.add_row("card", f"vlm models {entry.name} shows it" if "/" in entry.name else "none")
    _console().print(table)


def _commit(name: str) -> str | None:
    """Return the commit of a model that this machine uses, if it was downloaded."""
    from vlm.weights.pins import read_pin

    pin = read_pin(name)
    return None if pin is None else pin.commit


def _update(name: str | None) -> None:
    from vlm.weights.hub import is_hub_id, update
    from vlm.weights.registry import hub_name

    if name is None or not is_hub_id(hub_name(name)):
        raise UsageError("--update needs the name of a Hub model, such as EVA02-B-16")
    old, new = update(hub_name(name))
    print(f"{hub_name(name)} is at commit {new}" + (f" (before: {old})" if old else ""))


def _millions(text: str) -> float:
    """Parse a number of parameters such as 400M, 1.5B or 400000000; return millions."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([MBmb]?)", text)
    if match is None:
        raise UsageError(f"--max-params is {text!r}: give a count such as 400M or 1.5B")
    return float(match[1]) * {"M": 1.0, "B": 1e3, "": 1e-6}[match[2].upper()]
