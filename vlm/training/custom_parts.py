"""Custom parts of an experiment: given to `vlm.train`, loaded early, and hashed."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vlm.config import Code, DataConfig, EvalConfig, Experiment, OptimizerConfig, find_codes
from vlm.errors import ConfigError, brief
from vlm.training.console import log

Loss = Callable[..., Any] | str
# Fields of the optimizer that hold beside a transformation of the user.
BESIDE_TRANSFORMATION = ("ema", "max_scale", "on_nonfinite", "max_skipped_in_a_row")


def with_parts(
    experiment: Experiment,
    *,
    loss: Loss | Mapping[Loss, float] | None = None,
    optimizer: Any = None,
    data: Any = None,
    evals: Any = (),
    callbacks: Sequence[Any] = (),
) -> Experiment:
    """Return the experiment with parts of the user, as in `vlm.train`.

    Raises:
        ConfigError: a part of the wrong kind.
    """
    changes: dict[str, Any] = {}
    if isinstance(loss, list | tuple) or (isinstance(loss, Mapping) and not loss):
        raise ConfigError(
            f"loss is {brief(loss)}: give a function, or a mapping of functions to weights"
        )
    if loss is not None:
        changes["losses"] = loss if isinstance(loss, Mapping) else {loss: 1.0}
    if isinstance(optimizer, str) and ":" not in optimizer:
        raise ConfigError(
            f"optimizer is {brief(optimizer)}: give an optax transformation such as "
            "optax.adamw(1e-3), its import path, or a vlm.OptimizerConfig"
        )
    if isinstance(evals, Mapping):
        raise ConfigError("evals is a mapping: give a list of functions, which name their metrics")
    if optimizer is not None:
        own = isinstance(optimizer, OptimizerConfig)
        kept = {name: getattr(experiment.optimizer, name) for name in BESIDE_TRANSFORMATION}
        changes["optimizer"] = (
            optimizer if own else OptimizerConfig(transformation=optimizer, **kept)
        )
    if data is not None:
        own = isinstance(data, DataConfig)
        changes["data"] = data if own else dataclasses.replace(experiment.data, source=data)
    for field, more in (("evals", evals), ("callbacks", callbacks)):
        items = list(more) if isinstance(more, Iterable) and not isinstance(more, str) else [more]
        if items:
            changes[field] = _joined(getattr(experiment, field), items, field)
    return dataclasses.replace(experiment, **changes)


def _joined(before: tuple[Any, ...], items: list[Any], field: str) -> tuple[Any, ...]:
    """Add items to those of the experiment, or give a resumed run the objects that it lacks."""
    new = [x if isinstance(x, EvalConfig) else Code.of(x, field) for x in items]
    return (*(x for x in before if x not in new or _is_another(x)), *new)


def _is_another(x: Any) -> bool:
    """Whether an item has an object, and a text that objects of its class share."""
    return isinstance(x, Code) and not x.importable and x.is_known


def without_lost_callbacks(experiment: Experiment) -> Experiment:
    """Leave out callbacks of a resumed run that have no import path and were not given again."""
    lost = [str(c) for c in experiment.callbacks if not (c.importable or c.is_known)]
    if lost:
        log.warning(f"{', '.join(lost)}: left out, since the resumed run was not given it again")
    kept = tuple(c for c in experiment.callbacks if str(c) not in lost or c.is_known)
    return dataclasses.replace(experiment, callbacks=kept)


def with_code_hashes(experiment: Experiment) -> Experiment:
    """Load all code of the user, and record a hash of its source by import path.

    Raises:
        ConfigError: code that cannot be imported; the message names its field.
    """
    found: dict[str, str] = {}
    for where, code in find_codes(experiment):
        code.load(where)
        found[str(code)] = code.source_hash()
    if unnamed := sorted({str(code) for _, code in find_codes(experiment) if not code.importable}):
        log.info(
            f"{', '.join(unnamed)}: no import path, so to resume this run pass them again to "
            "vlm.train, or put them into a module"
        )
    return dataclasses.replace(experiment, code=tuple(sorted(found.items())))


def report_changed_code(before: Experiment, after: Experiment) -> None:
    """Log which code of the user has changed since the run was last started, or may have."""
    old = dict(before.code)
    if unknown := [path for path, value in after.code if not value]:
        log.warning(f"{', '.join(unknown)}: a change since the last start cannot be told")
    changed = [path for path, value in after.code if value != old.get(path, value)]
    if changed:
        log.warning(
            f"the source of {', '.join(changed)} has changed since the run was last started: the "
            "run goes on with the new code"
        )
