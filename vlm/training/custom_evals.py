"""Custom evaluations: functions of (bundle, step) that return metrics."""

import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from vlm.bundle import Bundle
from vlm.cluster.processes import exchange_texts
from vlm.config import Code
from vlm.errors import TrainingError, brief, first_line
from vlm.inputs.tokenizer import Tokenizer
from vlm.training.console import log
from vlm.training.step import Trainer, TrainState


class CustomEvals:
    """The functions among `evals`; all processes call them."""

    def __init__(self, evals: Iterable[Any], trainer: Trainer, tokenizer: Tokenizer):
        self._evals = [code for code in evals if isinstance(code, Code)]
        self._trainer, self._tokenizer = trainer, tokenizer
        self._last: Bundle | None = None
        self.names = [code.name for code in self._evals]

    def bundle(self, state: TrainState) -> Bundle:
        """Return the model of a state; it shares memory with the state."""
        e = self._trainer.experiment
        model = self._trainer.model(state)
        bundle = Bundle(
            model, self._trainer.preprocess, self._tokenizer, e.name, templates=e.data.templates
        )
        if self._last is not None:  # its programs are compiled, and take the parameters as inputs
            programs = {k: v for k, v in vars(self._last).items() if k.endswith("_program")}
            vars(bundle).update(programs)
        self._last = bundle
        return bundle

    def metrics(self, state: TrainState) -> dict[str, float]:
        """Compute the metrics of all functions, as NAME/METRIC.

        Raises:
            TrainingError: one failed in some process, or returned no numbers.
        """
        found: dict[str, float] = {}
        if not self._evals:
            return found
        bundle, step = self.bundle(state), int(state.step)
        for code in self._evals:
            metrics, failure, error = _call(code, bundle, step)
            if failure := next(filter(None, exchange_texts(failure)), ""):
                raise TrainingError(failure) from error
            log.info(f"step {step}  {code.name} {_as_text(metrics)}")
            found |= {f"{code.name}/{name}": value for name, value in metrics.items()}
        return found


def _call(code: Code, bundle: Bundle, step: int) -> tuple[dict[str, float], str, Exception | None]:
    """Return the metrics of a function, or why it failed, and its exception."""
    where = f"the evaluation {code} at step {step}"
    after = "a checkpoint is saved: fix it and resume the run"
    try:
        metrics = code.load("evals")(bundle, step)
    except Exception as error:
        reason = f"{where} failed with {type(error).__name__}: {first_line(error)}; {after}"
        return {}, reason, error
    if not isinstance(metrics, Mapping):
        kind = type(metrics).__name__
        return {}, f"{where} returned a {kind} and not a mapping of names to numbers; {after}", None
    for name, value in metrics.items():
        if not _is_number(value):
            reason = f"{where} returned {name!r}: {brief(value)}, which is no number; {after}"
            return {}, reason, None
    return {str(name): float(value) for name, value in metrics.items()}, "", None


def _is_number(x: Any) -> bool:
    return isinstance(x, numbers.Real) or getattr(x, "shape", None) == ()


def _as_text(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
