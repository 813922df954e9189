"""Changes of a resumed run: every change is accepted that keeps its checkpoints valid."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict

from vlm.config import Config, Experiment, to_dict
from vlm.config.files import json_value
from vlm.config.resume import Effect, effect_of_change
from vlm.errors import ConfigError, brief

LENGTHS = ("steps", "epochs", "examples", "seconds")


class Change(NamedTuple):
    """A changed field: its dotted name, its values as JSON, and its effect."""

    name: str
    old: Any
    new: Any
    effect: Effect


def changes_between(before: Experiment, after: Experiment) -> list[Change]:
    """Return the fields that differ, sorted by name; see `vlm.config.resume` for their effects."""
    return sorted(_differences(before, after, ""))


def check_changes(before: Experiment, after: Experiment) -> dict[str, list[Any]]:
    """Return [before, after] of each changed field if a resumed run may make all changes.

    Raises:
        ConfigError: a change that would make its checkpoints invalid, or that would have no
            effect; the message names it.
    """
    changes = changes_between(before, after)
    reasons: dict[str, list[str]] = {}
    for change in changes:
        if change.effect.refused:
            option = "--" + change.name.replace("_", "-")
            text = f"{option} ({brief(change.old)} to {brief(change.new)})"
            reasons.setdefault(change.effect.value, []).append(text)
    if reasons:
        refused = "; nor ".join(f"{', '.join(names)}, {why}" for why, names in reasons.items())
        raise ConfigError(
            f"a resumed run cannot change {refused}: leave that out, or start a new run, with "
            "--init-from this run to reuse its weights"
        )
    return {change.name: [change.old, change.new] for change in changes}


def _differences(before: Any, after: Any, name: str, effect: Effect | None = None) -> Iterator:
    """Yield the changes inside of two values of the field `name`, whose own effect is `effect`."""
    if isinstance(before, Config) and type(before) is type(after):
        for field in dataclasses.fields(before):  # pyright: ignore[reportArgumentType]
            yield from _differences(
                getattr(before, field.name),
                getattr(after, field.name),
                f"{name}.{field.name}" if name else field.name,
                effect_of_change(before, after, field.name),
            )
    elif isinstance(before, tuple) and _same_classes(before, after):
        for number, pair in enumerate(zip(before, after, strict=True)):
            yield from _differences(pair[0], pair[1], f"{name}.{number}")
    elif (old := json_value(before)) != (new := json_value(after)):
        assert effect is not None
        yield Change(name, old, new, effect)


def _same_classes(before: tuple[Any, ...], after: Any) -> bool:
    """Whether two values are tuples of configs of the same classes."""
    return (
        isinstance(after, tuple)
        and list(map(type, before)) == list(map(type, after))
        and all(isinstance(part, Config) for part in before)
    )


def without_length(experiment: Experiment) -> Experiment:
    """Return the experiment without its length, so that another kind of length can be set."""
    return dataclasses.replace(experiment, **dict.fromkeys(LENGTHS))


def flat_fields(experiment: Experiment) -> dict[str, Any]:
    """Return all fields by their dotted names."""
    return flatten_dict(to_dict(experiment), sep=".")
