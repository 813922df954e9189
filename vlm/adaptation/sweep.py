"""Accuracy of blends by alpha, in and out of distribution, as a chart."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlm._html import render
from vlm.adaptation.blending import HEADLINE, blend, repeatable
from vlm.bundle import Bundle
from vlm.errors import ConfigError
from vlm.evaluation.charts import Line, line_chart, percent
from vlm.evaluation.intervals import Metric
from vlm.evaluation.tasks import Task
from vlm.paths import as_path

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Sweep:
    """Metrics of blends of two models.

    Attributes:
        alphas: weights of the second model.
        points: for each task, a metric per alpha.

    Example:
        >>> task = vlm.RetrievalTask(pictures, ["red", "green", "blue"], vlm.DataInfo("colours"))
        >>> result = vlm.adaptation.sweep_alpha(model, model, {"colours": task}, (0.0, 1.0))
        >>> result.alphas
        (0.0, 1.0)
    """

    alphas: tuple[float, ...]
    points: dict[str, tuple[Metric, ...]]

    @property
    def headings(self) -> list[str]:
        """Headings of the table of values."""
        return ["alpha", *self.points]

    @property
    def rows(self) -> list[list[str]]:
        """Cells of the table of values, a row per alpha."""
        columns = zip(*self.points.values(), strict=True)
        return [[f"{a:g}", *map(str, row)] for a, row in zip(self.alphas, columns, strict=True)]

    def svg(
        self, title: str = "Accuracy by weight of the fine-tuned model", standalone: bool = False
    ) -> str:
        """Draw the chart; `standalone` includes the styles that a page otherwise has."""
        lines = [
            Line.of_metrics(name, self.alphas, row, color % 4)
            for color, (name, row) in enumerate(self.points.items())
        ]
        return line_chart(lines, title, "alpha", percent, standalone=standalone)

    def write_page(self, path: str | os.PathLike, lead: str) -> None:
        """Write an HTML page of the chart and the table, `lead` under its title."""
        html = render(
            "adaptation/sweep.html",
            title="Blend of two models",
            lead=lead,
            chart=self.svg(),
            headings=self.headings,
            rows=self.rows,
            footnotes=["Measure an alpha that was chosen from this chart again on other data."],
        )
        as_path(path).write_text(html)

    def _repr_html_(self) -> str:
        return self.svg(standalone=True)


def sweep_alpha(
    a: Bundle, b: Bundle, tasks: Mapping[str, Task], alphas: Sequence[float] = ALPHAS
) -> Sweep:
    """Measure blends of two models on tasks: `a` at alpha 0, `b` at 1.

    It chooses no alpha. An alpha that is chosen from the chart must be measured on other data.

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
