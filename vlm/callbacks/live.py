"""Live display of a run in a notebook."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from vlm._html import render
from vlm.callbacks.base import Callback, Divergence, RunInfo
from vlm.display import clock, in_notebook
from vlm.evaluation.charts import Line, curve, line_chart, short

EVERY = 1.0  # seconds between two updates
# Metrics of evaluations that are shown first, and their short names.
CHARTED = {"top1": "top-1", "text_to_image_R@1": "T→I R@1", "image_to_text_R@1": "I→T R@1"}
MOST = 3  # metrics of evaluations


@dataclasses.dataclass(frozen=True, eq=False)
class Live(Callback):
    """Show a table of the last metrics, and charts of loss and evaluations, in a notebook.

    The display is updated in place, at most once a second, and the notebook keeps its last state.
    Outside of notebooks it does nothing. `vlm.train` adds it by itself.

    Example:
        >>> vlm.callbacks.Live()
        Live()
    """

    _run: dict[str, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def on_start(self, run: RunInfo) -> None:
        self._run.clear()
        self._run.update(run=run, losses=[], last={}, evals=[], status="starting", shown=0.0)
        if in_notebook():
            from IPython.display import HTML, display

            self._run["handle"] = display(HTML(self.html()), display_id=True)

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        if "loss" in metrics:
            self._run["losses"].append((step, metrics["loss"]))
            now = step, metrics.get("seconds", 0.0)
            began, then = self._run.get("now", (self._run["run"].step, 0.0))
            pace = (now[1] - then) / max(1, step - began)
            self._run.update(last=dict(metrics), status="training", now=now, pace=pace)
            self._update()

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run["evals"].append((step, _chosen(metrics)))
        self._update()

    def on_divergence(self, divergence: Divergence) -> None:
        if divergence.to_step is not None:
            for name in ("losses", "evals"):
                kept = [point for point in self._run[name] if point[0] <= divergence.to_step]
                self._run[name] = kept

    def on_end(self, run: RunInfo, results: Mapping[str, float], finished: bool) -> None:
        if self._run:
            self._run["status"] = "finished" if finished else "stopped"
            if results:
                self._run["evals"].append((run.total_steps, _chosen(results)))
            self._update(wait=0.0)

    def _update(self, wait: float = EVERY) -> None:
        if "handle" in self._run and time.monotonic() - self._run["shown"] >= wait:
            from IPython.display import HTML

            self._run["handle"].update(HTML(self.html()))
            self._run["shown"] = time.monotonic()

    def html(self) -> str:
        """Render the display."""
        run, status, evals = self._run["run"], self._run["status"], self._run["evals"]
        losses, last = self._run["losses"], self._run["last"]
        step = losses[-1][0] if losses else run.step
        facts = {n: f"{v:.3f}" for n, v in last.items() if n.split("/")[0] == "loss"}
        if speed := last.get("pairs_per_s"):
            facts |= {"pairs/s": f"{speed:,.0f}", "data wait": f"{last['data_wait']:.1%}"}
            if status == "training":
                facts["ETA"] = clock((run.total_steps - step) * self._run["pace"])
        if evals:
            at, metrics = evals[-1]
            facts["evaluation at step"] = f"{at:,}"
            facts |= {name: short(value) for name, value in metrics.items()}
        return render(
            "callbacks/live.html",
            name=run.folder.name,
            status=status,
            step=step,
            total=run.total_steps,
            facts=facts,
            charts=_charts(losses, evals),
        )


def _chosen(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of an evaluation to show, by short names."""
    names = [name for known in CHARTED for name in metrics if name.split("/")[-1] == known]
    shown = {name: metrics[name] for name in (names or list(metrics))[:MOST]}
    return {_short_name(name): value for name, value in shown.items()}


def _short_name(name: str) -> str:
    *path, last = name.removeprefix("eval/").split("/")
    return " ".join([*path, CHARTED.get(last, last)])


def _charts(
    losses: list[tuple[int, float]], evals: list[tuple[int, dict[str, float]]]
) -> list[str]:
    """Draw the loss, and the metrics of evaluations, over steps."""
    names = dict.fromkeys(name for _, metrics in evals for name in metrics)
    columns = {n: [(step, m[n]) for step, m in evals if n in m] for n in names}
    evaluations = [
        Line(name, *zip(*points, strict=True), markers=True, color=i % 4)
        for i, (name, points) in enumerate(columns.items(), 1)
    ]
    drawn = [
        line_chart(curve("loss", *zip(*losses, strict=True)), "Loss", standalone=True)
        if losses
        else "",
        line_chart(evaluations, "Evaluations", from_zero=True, standalone=True),
    ]
    return [chart for chart in drawn if chart]
