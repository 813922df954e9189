"""Phases of a run: fields of its experiment that change on the way, such as the image size.

Changes add up: a phase keeps those of the phases before it. `in_phase` returns the experiment of a
phase, and `check_phases` what a phase may not change.
"""

import dataclasses
import difflib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from vlm.config.base import Config, json_value
from vlm.config.optimizer import UNSET, Converted
from vlm.config.resume import Effect, changes_between, option_of
from vlm.errors import ConfigError, brief

T = TypeVar("T", bound=Config)

# Fields that a model of `init_from` fills in before the run starts.
_RESOLVED = ("model", "preprocess", "tokenizer")
# Effects of a changed field that a resumed run refuses and a phase handles.
_HANDLED = (Effect.RESOLUTION, Effect.TRAINED)
# Fields that belong to the whole run.
_OF_RUN = {
    "name", "mesh", "evals", "steps", "epochs", "examples", "seconds", "seed", "log_every",
    "eval_every", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "keep_hours",
    "profile", "run_dir", "callbacks", "code", "phases", "sequence_lengths", "divergence",
    "local_checkpoints",
}  # fmt: skip


@dataclass(frozen=True)
class Phase(Config):
    """A phase of a run: from a point of the run on, some fields of its experiment are different.

    Give one of step, fraction and examples, the same in all phases of a run.

    Args:
        changes: New values by the dotted names of fields, such as {"batch_size": 512,
            "data.augment.flip": True}. They are the names of the options of `vlm train`.
        step: Number of steps before the phase.
        fraction: Fraction of the run's steps before the phase.
        examples: Number of pairs seen before the phase.
        restart_schedule: Start the learning rate schedule again, warm-up included. It then runs
            from this phase to the next restart, or to the end of the run. Otherwise it runs on.

    Example:
        >>> from vlm.config import Phase
        >>> Phase({"text_masking": 0.0}, fraction=0.9).changes
        (('text_masking', 0.0),)
    """

    if TYPE_CHECKING:
        changes: Converted[tuple[tuple[str, Any], ...]] = UNSET
    else:
        changes: tuple[tuple[str, Any], ...] = ()
    step: int | None = None
    fraction: float | None = None
    examples: int | None = None
    restart_schedule: bool = False

    def __post_init__(self):
        changes = _pairs(self.changes)
        object.__setattr__(self, "changes", ())  # `Experiment` knows the types of the values
        super().__post_init__()
        object.__setattr__(self, "changes", changes)

    @classmethod
    def from_fields(cls, values: Any, where: str) -> "Phase":
        if not isinstance(values, dict) or "changes" not in values:
            return super().from_fields(values, where)
        rest = {name: value for name, value in values.items() if name != "changes"}
        return dataclasses.replace(super().from_fields(rest, where), changes=values["changes"])

    def check(self):
        given = [n for n in ("step", "fraction", "examples") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ConfigError(
                "a phase begins at one point: give one of step, fraction and examples, and not "
                f"{' and '.join(given) or 'none'}"
            )

    @property
    def unit(self) -> str:
        """The field that gives its begin: step, fraction or examples."""
        return next(n for n in ("step", "fraction", "examples") if getattr(self, n) is not None)

    @property
    def begin(self) -> str:
        """Its begin in words, such as "step 1,000"."""
        value = getattr(self, self.unit)
        return f"{self.unit.removesuffix('s')} {value:{'g' if isinstance(value, float) else ','}}"

    def description(self) -> str:
        """Describe the changes by their options."""
        parts = [f"{option_of(name)} {brief(json_value(value))}" for name, value in self.changes]
        return ", ".join([*parts, *["the schedule starts again"] * self.restart_schedule])


def in_phase(experiment: Any, number: int) -> Any:
    """Return the `Experiment` of phase `number`, whose `phases` are those after it.

    Phase 0 is the begin of the run; the others are `experiment.phases` in their order.

    Example:
        >>> import dataclasses
        >>> from vlm.config import Phase, in_phase
        >>> phases = (Phase({"batch_size": 8}, step=2),)
        >>> run = dataclasses.replace(experiment, steps=4, phases=phases)
        >>> in_phase(run, 1).batch_size, in_phase(run, 1).phases
        (8, ())
    """
    changes: dict[str, Any] = {}
    for phase in experiment.phases[:number]:
        changes |= dict(phase.changes)
    later = experiment.phases[number:]
    return with_fields(dataclasses.replace(experiment, phases=()), changes, phases=later)


def check_phases(experiment: Any) -> tuple[Phase, ...]:
    """Return the phases of an `Experiment`, their values converted to the types of the fields.

    Phases that change a model which `init_from` has still to fill in are checked after that.

    Raises:
        ConfigError: phases out of order or beyond the run's length, an unknown field, a wrong
            value, or a change that a run cannot make; the message names the phase.
    """
    phases: tuple[Phase, ...] = experiment.phases
    _check_order(experiment)
    now, checked = dataclasses.replace(experiment, phases=()), []
    for number, phase in enumerate(phases, 1):
        where = f"phase {number} ({phase.begin})"
        if not phase.changes and not phase.restart_schedule:
            raise ConfigError(f"{where} changes nothing: give changes, or leave it out")
        _check_names(phase, where)
        if any(_is_unresolved(now, name) for name, _ in phase.changes):
            return (*checked, *phases[number - 1 :])
        try:
            after = with_fields(now, dict(phase.changes))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        if phase.restart_schedule and after.optimizer.transformation is not None:
            raise ConfigError(
                f"{where} has restart_schedule, and optimizer.transformation has a schedule of "
                "its own: leave restart_schedule out"
            )
        check_transition(now, after, where)
        values = tuple((name, _get(after, name)) for name, _ in phase.changes)
        checked.append(dataclasses.replace(phase, changes=values))
        now = after
    return tuple(checked)


def check_transition(before: Any, after: Any, where: str, *, begun: bool = False) -> None:
    """Raise a ConfigError unless a run can go on from one experiment to the other.

    It can where a resumed run may make the changes. At the begin of a phase, other image sizes and
    other trained parameters are possible too; not in a phase that has `begun`.
    """
    for change in changes_between(before, after):
        if change.effect.refused and (begun or change.effect not in _HANDLED):
            raise ConfigError(
                f"{where} cannot change {option_of(change.name)} ({brief(change.old)} to "
                f"{brief(change.new)}), {change.effect.value}: leave it out, or train it as a run "
                "of its own with --init-from"
            )
        if change.effect is Effect.RESOLUTION and after.model.vision.kind != "vit":
            raise ConfigError(
                f"{where} cannot change {option_of(change.name)} of a "
                f"{type(after.model.vision).__name__}, only of a Vision Transformer: leave it out"
            )


def with_fields(config: T, changes: Mapping[str, Any], **own: Any) -> T:
    """Return a config with other values of the fields of dotted names, all replaced at once.

    Raises:
        ConfigError: an unknown field, a field of a part that is not set, or a wrong value.
    """
    known = [field.name for field in dataclasses.fields(config)]  # pyright: ignore[reportArgumentType]
    inner: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        if first not in known:
            near = difflib.get_close_matches(first, known, 2)
            fix = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
            raise ConfigError(f"{type(config).__name__} has no field {first!r}: {fix}")
        if rest:
            inner.setdefault(first, {})[rest] = value
        else:
            own[first] = value
    for name, parts in inner.items():
        own[name] = _with_parts(own.get(name, getattr(config, name)), parts, name)
    return dataclasses.replace(config, **own)  # pyright: ignore[reportArgumentType]


def _with_parts(part: Any, changes: Mapping[str, Any], name: str) -> Any:
    if isinstance(part, Config):
        return with_fields(part, changes)
    first = next(iter(changes))
    index, _, rest = first.partition(".")
    if not isinstance(part, tuple) or not rest or not index.isdigit() or int(index) >= len(part):
        is_what = "is not set" if part is None else f"is {brief(part)}"
        raise ConfigError(f"{name}.{first} does not exist, since {name} {is_what}: give {name}")
    items = list(part)
    for key, value in changes.items():
        index, _, rest = key.partition(".")
        items[int(index)] = _with_parts(items[int(index)], {rest: value}, f"{name}.{index}")
    return tuple(items)


def _get(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config[int(part)] if part.isdigit() else getattr(config, part)
    return config


def _pairs(changes: Any) -> tuple[tuple[str, Any], ...]:
    """Return changes as pairs of a name, written with underscores, and a value."""
    items: Iterable[Any] = changes.items() if isinstance(changes, Mapping) else changes
    if isinstance(changes, str) or not isinstance(items, Iterable):
        raise ConfigError(f"Phase.changes must be a mapping of names, not {brief(changes)}")
    pairs: dict[str, Any] = {}
    for item in items:
        if not isinstance(item, list | tuple) or len(item) != 2 or not isinstance(item[0], str):
            raise ConfigError(f"Phase.changes has {brief(item)}: give a name and a value")
        name = item[0].removeprefix("--").replace("-", "_")
        if name in pairs:
            raise ConfigError(f"Phase.changes has {name!r} twice: keep one")
        value = item[1]
        pairs[name] = tuple(value) if isinstance(value, list) else value
    return tuple(pairs.items())


def _check_order(experiment: Any) -> None:
    e, phases = experiment, experiment.phases
    units = sorted({phase.unit for phase in phases})
    if len(units) > 1:
        raise ConfigError(
            f"the phases begin by {' and '.join(units)}: give all of them in one unit"
        )
    if phases and e.seconds is not None:
        raise ConfigError(
            f"a run of {e.seconds:g} seconds cannot have phases, since its steps have several "
            "durations: set its length as steps, examples or epochs"
        )
    begins = [getattr(phase, units[0]) for phase in phases]
    for number, (one, two) in enumerate(itertools.pairwise(begins), 2):
        if two <= one:
            raise ConfigError(
                f"phase {number} begins at {phases[number - 1].begin}, and phase {number - 1} at "
                f"{phases[number - 2].begin}: put the phases in their order"
            )
    length = {"step": e.steps, "examples": e.examples}.get(units[0]) if units else None
    if length is not None and begins[-1] >= length:
        raise ConfigError(
            f"phase {len(phases)} begins at {phases[-1].begin}, and the run ends at "
            f"{units[0]} {length:,}: make the run longer, or the phase earlier"
        )


def _check_names(phase: Phase, where: str) -> None:
    for name, _ in phase.changes:
        if name.partition(".")[0] in _OF_RUN:
            raise ConfigError(
                f"{where} cannot change {option_of(name)}, which belongs to the whole run: set it "
                "outside of the phases"
            )


def _is_unresolved(experiment: Any, name: str) -> bool:
    first, _, rest = name.partition(".")
    return first in _RESOLVED and bool(rest) and getattr(experiment, first) is None
