"""What a tower computes on its way, for whoever asks: noted by name, and open to small changes.

big_vision's towers give a dict of all that lies between (`out`). Here whoever wants it passes
`Taps`, and a tower that gets none compiles to the program it always was. A change is added to what
it is named after, so the gradient of a score by a change of zeros is its gradient by the
intermediate itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from jaxtyping import Array


@dataclass(frozen=True)
class Taps:
    """Intermediates by name, once a tower has run with them.

    Attributes:
        changes: by name, arrays that are added to the intermediates.
        found: the intermediates, with the changes in them.
        prefix: what the names of a part begin with.
    """

    changes: Mapping[str, Array] = field(default_factory=dict)
    found: dict[str, Array] = field(default_factory=dict)
    prefix: str = ""


def tap(taps: Taps | None, name: str, value: Array) -> Array:
    """`value`, noted and changed if somebody asks."""
    if taps is None:
        return value
    name = taps.prefix + name
    if name in taps.changes:
        value = value + taps.changes[name].astype(value.dtype)
    taps.found[name] = value
    return value


def part(taps: Taps | None, name: str) -> Taps | None:
    """The same taps for a part of the tower, whose names begin with `name` and a slash."""
    return None if taps is None else replace(taps, prefix=f"{taps.prefix}{name}/")


def changes_below(taps: Taps | None, name: str) -> dict[str, Array]:
    """The changes to a part, by the names that it has for them itself."""
    if taps is None:
        return {}
    start = f"{taps.prefix}{name}/"
    return {
        key.removeprefix(start): value
        for key, value in taps.changes.items()
        if key.startswith(start)
    }
