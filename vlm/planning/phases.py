"""Plans of the phases of a run: each as an experiment of its own, and their sum."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from vlm.config import Experiment, in_phase
from vlm.planning.calibration import Range
from vlm.planning.prediction import Plan
from vlm.planning.report import long_time, show
from vlm.training.init_from import resolve
from vlm.training.schedule import check_starts, phase_starts, steps_to


def phase_experiments(experiment: Experiment) -> list[Experiment]:
    """Return the experiment of each phase, without phases and as long as the phase.

    A run in epochs has phases of unknown length.

    Raises:
        ConfigError: a phase that the run cannot change to, or beyond its length.
    """
    e = resolve(experiment)
    total = e.steps
    if e.examples is not None:
        total = steps_to(e.examples, e, 0, 0)
    parts = [in_phase(e, number) for number in range(len(e.phases) + 1)]
    parts = [dataclasses.replace(part, phases=()) for part in parts]
    if total is None:
        return parts
    starts = phase_starts(e, total)
    check_starts(e, starts, total, 0)
    lengths = [end - start for start, end in zip([0, *starts], [*starts, total], strict=True)]
    length = {"examples": None, "epochs": None}
    return [
        dataclasses.replace(part, steps=steps, **length)
        for part, steps in zip(parts, lengths, strict=True)
    ]


def show_phases(
    experiment: Experiment, plans: Sequence[Plan], console: Console, price: float | None
) -> None:
    """Print the plan of each phase, and the time and cost of them together."""
    for title, planned in zip(_titles(experiment, plans), plans, strict=True):
        console.print(f"\n[bold]{escape(title)}[/]", highlight=False)
        show(planned, console, price)
    if total := whole_run(plans, price):
        texts = [f"{long_time(total['seconds'][0])} to {long_time(total['seconds'][1])}"]
        if "cost" in total:
            texts.append(f"cost {total['cost'][0]:,.0f} to {total['cost'][1]:,.0f}")
        console.print(f"\n[bold]all phases[/]: {'; '.join(texts)}", highlight=False)


def whole_run(plans: Sequence[Plan], price: float | None) -> dict[str, list[float]]:
    """Return seconds and cost of all phases together, as far as all of them are known."""
    needed = [planned.needs(price) for planned in plans]
    total: dict[str, list[float]] = {}
    for name in ("seconds", "cost"):
        found = [getattr(needs, name, None) for needs in needed]
        ranges = [value for value in found if isinstance(value, Range)]
        if len(ranges) == len(plans):
            total[name] = [sum(value.low for value in ranges), sum(value.high for value in ranges)]
    return total


def to_dict(experiment: Experiment, plans: Sequence[Plan], price: float | None) -> dict[str, Any]:
    """Convert the plans to JSON values."""
    titles = _titles(experiment, plans)
    phases = [
        {"phase": title, "steps": planned.experiment.steps} | planned.to_dict(price)
        for title, planned in zip(titles, plans, strict=True)
    ]
    return {"phases": phases, "all": whole_run(plans, price)}


def _titles(experiment: Experiment, plans: Sequence[Plan]) -> Iterator[str]:
    step = 0
    for number, planned in enumerate(plans):
        steps = planned.experiment.steps
        place = "" if steps is None else f"{steps:,} steps from step {step:,}"
        if number:
            phase = experiment.phases[number - 1]
            yield f"phase {number} ({place or f'from {phase.begin}'}): {phase.description()}"
        else:
            yield f"phase 0 ({place})" if place else "phase 0"
        step += steps or 0
