"""Accuracy against the share of the fine-tuned model, in and out of distribution: one picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlm.adaptation.blending import HEADLINE, blend, repeatable
from vlm.bundle import Bundle
from vlm.errors import ConfigError
from vlm.evaluation.chart import Line, alone, line_chart
from vlm.evaluation.intervals import Metric
from vlm.evaluation.tasks import Task

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Sweep:
    """What blends of two models reach.

    Attributes:
        alphas: the shares of the second model.
        points: by task, a metric for each alpha.

    Example:
        >>> task = vlm.RetrievalTask(pictures, ["red", "green", "blue"], vlm.DataInfo("colours"))
        >>> found = vlm.adaptation.sweep_alpha(model, model, {"colours": task}, (0.0, 1.0))
        >>> found.alphas
        (0.0, 1.0)
    """

    alphas: tuple[float, ...]
    points: dict[str, tuple[Metric, ...]]

    def svg(self, title: str = "Accuracy by share of the fine-tuned model") -> str:
        """The picture, for a page or a file."""
        lines = [
            Line(
                name,
                self.alphas,
                [m.value for m in row],
                [m.low for m in row],
                [m.high for m in row],
                markers=True,
                color=color % 4,
            )
            for color, (name, row) in enumerate(self.points.items())
        ]
        return line_chart(lines, title, "alpha", lambda y: f"{100 * y:.3g}%")

    def _repr_html_(self) -> str:
        return alone(self.svg())


def sweep_alpha(
    a: Bundle, b: Bundle, tasks: Mapping[str, Task], alphas: Sequence[float] = ALPHAS
) -> Sweep:
    """Measure blends of two models on tasks: `a` at alpha 0, `b` at 1.

    Nothing is chosen here. An alpha that is chosen by a picture must be measured on other data.

    Raises:
        ConfigError: no tasks, or see `blend`.

    Example:
        >>> task = vlm.RetrievalTask(pictures, ["red", "green", "blue"], vlm.DataInfo("colours"))
        >>> vlm.adaptation.sweep_alpha(model, model, {"colours": task}, (0.0, 1.0)).alphas
        (0.0, 1.0)
    """
    if not tasks:
        raise ConfigError("there are no tasks to measure blends on: give at least one")
    tasks = {name: repeatable(task) for name, task in tasks.items()}
    rows: dict[str, list[Metric]] = {name: [] for name in tasks}
    for alpha in alphas:
        model = blend(a, b, alpha)
        for name, task in tasks.items():
            metrics = task.measure(model).metrics
            rows[name].append(next(metrics[key] for key in HEADLINE if key in metrics))
    return Sweep(tuple(alphas), {name: tuple(row) for name, row in rows.items()})
