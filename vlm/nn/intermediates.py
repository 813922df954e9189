"""Capture (and optionally perturb) named intermediate activations.

A caller passes `Intermediates` to a tower and reads the captured arrays afterwards. Without it, the
compiled program is unchanged. Perturbations are added to the activation of the same name, so the
gradient of a score by a perturbation of zeros is its gradient by the activation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from jaxtyping import Array


@dataclass(frozen=True)
class Intermediates:
    """Intermediate activations by name, filled by a tower.

    Attributes:
        changes: arrays to add to the activations, by name.
        found: captured activations, including the changes.
        prefix: prefix of the names of a submodule.

    Example:
        >>> found = vlm.nn.Intermediates()
        >>> model.model.encode_text(jnp.ones((2, 12), jnp.int32), intermediates=found).shape
        (2, 16)
        >>> found.found["embedding"].shape
        (2, 12, 16)
    """

    changes: Mapping[str, Array] = field(default_factory=dict)
    found: dict[str, Array] = field(default_factory=dict)
    prefix: str = ""


def capture(intermediates: Intermediates | None, name: str, value: Array) -> Array:
    """Capture `value` under `name`, and return it with its perturbation.

    Example:
        >>> intermediates = vlm.nn.Intermediates()
        >>> x = vlm.nn.capture(intermediates, "hidden", jnp.ones((2, 8)))
        >>> intermediates.found["hidden"].shape
        (2, 8)
    """
    if intermediates is None:
        return value
    name = intermediates.prefix + name
    if name in intermediates.changes:
        value = value + intermediates.changes[name].astype(value.dtype)
    intermediates.found[name] = value
    return value


def part(intermediates: Intermediates | None, name: str) -> Intermediates | None:
    """Return a view for a submodule, whose names begin with `name` and a slash."""
    return (
        None
        if intermediates is None
        else replace(intermediates, prefix=f"{intermediates.prefix}{name}/")
    )


def changes_below(intermediates: Intermediates | None, name: str) -> dict[str, Array]:
    """Return the perturbations of a submodule, by their names inside it."""
    if intermediates is None:
        return {}
    start = f"{intermediates.prefix}{name}/"
    return {
        key.removeprefix(start): value
        for key, value in intermediates.changes.items()
        if key.startswith(start)
    }
