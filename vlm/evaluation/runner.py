"""Measurement of tasks, and the report of their results with provenance."""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from etils import epath
from rich.markup import escape as markup
from rich.table import Table

from vlm._html import render
from vlm._json import to_json
from vlm._version import __version__
from vlm.errors import CheckpointError, ConfigError
from vlm.evaluation.evidence import Samples, model_facts
from vlm.evaluation.intervals import Metric, caveat
from vlm.evaluation.tasks import DataInfo, Task
from vlm.heads.encoder import Encoder
from vlm.heads.templates import describe_templates

FORMAT, VERSION = "vlm evaluation report", 1
LIBRARIES = ("jax", "flax", "numpy", "pillow", "tokenizers")


@dataclass(frozen=True)
class Provenance:
    """Origin of a result: model, data, templates, software and hardware."""

    model: str
    data: DataInfo
    templates: tuple[str, ...]
    date: str  # ISO 8601, UTC
    seconds: float  # of encoding and scoring
    device: str
    versions: dict[str, str]
    # Hashes or descriptions, if known: `fingerprint` (of the weights), `preprocess`, `decode` (rule
    # for image files), `tokenizer`, `dtype`, `data_hash` (images and targets), `texts_hash`
    # (captions, class names).
    evidence: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """Metrics of one task by name, and their provenance."""

    task: str
    metrics: dict[str, Metric]
    provenance: Provenance
    kind: str = ""  # of task, in CLIP_benchmark's terms
    # Of each query; stored as Parquet, not in the JSON.
    samples: Samples | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def texts(self) -> list[str]:
        """Templates and reworded labels of zero-shot classification."""
        if "top1" not in self.metrics:
            return []
        if (head := self.provenance.evidence.get("head")) is not None:
            return [head]
        reworded = self.provenance.evidence.get("class_names")
        templates = f"templates: {describe_templates(self.provenance.templates)}"
        return [templates, *([reworded] if reworded else [])]


@dataclass(frozen=True)
class Report:
    """Results in the order of the tasks, as JSON, a table, or HTML.

    Example:
        >>> task = vlm.RetrievalTask(pictures, ["red", "green", "blue"], vlm.DataInfo("colours"))
        >>> report = vlm.evaluation.evaluate(model, [task])
        >>> report[task.name].provenance.data.name
        'colours'
    """

    results: tuple[Result, ...]

    def __getitem__(self, task: str) -> Result:
        """Return the result of a task by its name.

        Raises:
            ConfigError: no such task; the message lists the tasks.
        """
        for result in self.results:
            if result.task == task:
                return result
        names = ", ".join(repr(result.task) for result in self.results) or "none"
        raise ConfigError(f"the report has no task {task!r}: it has {names}")

    def to_json(self) -> str:
        """Serialise the report as JSON; `from_json` returns an equal report."""
        results = [dataclasses.asdict(dataclasses.replace(r, samples=None)) for r in self.results]
        for result in results:
            del result["samples"]
        body = {"format": FORMAT, "version": VERSION, "results": results}
        return to_json(body, indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, where: str = "the report") -> "Report":
        """Parse a report of `to_json`.

        Raises:
            CheckpointError: not JSON, not a report, or another version; names `where`.
        """
        try:
            body = json.loads(text)
            if body.get("format") != FORMAT or body.get("version") != VERSION:
                raise CheckpointError(
                    f"{where} is no evaluation report of version {VERSION}: evaluate again"
                )
            return cls(tuple(_result(values) for values in body["results"]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{where} is not an evaluation report ({error!r}): evaluate again"
            ) from None

    def save(self, path: str | os.PathLike) -> None:
        """Write the JSON to a local or remote path."""
        epath.Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Report":
        """Read a report from JSON.

        Raises:
            CheckpointError: no such file, or no report in it.
        """
        path = epath.Path(path)
        if not path.is_file():
            raise CheckpointError(f"there is no report {path}: give the path of its JSON file")
        return cls.from_json(path.read_text(), str(path))

    def __rich__(self) -> Table:
        """Make the table that `rich.print` shows."""
        title, note = f"Evaluation of {self._models()}", self.caveat or None
        table = Table(title=title, title_justify="left", caption=note, caption_justify="left")
        table.add_column("task", overflow="fold")
        table.add_column("metric", no_wrap=True)
        for heading in ("value", "95% interval", "n"):
            table.add_column(heading, justify="right", no_wrap=True)
        for result in self.results:
            table.add_section()
            heads = [markup(result.task), f"[dim]{markup(str(result.provenance.data))}"]
            heads += [f"[dim]{markup(text)}" for text in result.texts]
            rows = [
                (name, f"[bold]{m.value:.1%}", *_cells(m)) for name, m in result.metrics.items()
            ]
            for head, row in zip_longest(heads, rows, fillvalue=""):
                table.add_row(head, *row)
        if decoded := self._decode():
            table.caption = f"Images are decoded as: {decoded}"
        return table

    def _repr_html_(self) -> str:
        rows = [
            (r.task, r.provenance.data, "; ".join(r.texts), name, f"{m.value:.1%}", *_cells(m))
            for r in self.results
            for name, m in r.metrics.items()
        ]
        decoded = f", images decoded as: {rule}" if (rule := self._decode()) else ""
        headings = ("task", "data", "texts", "metric", "value", "95% interval", "n")
        caption = f"Evaluation of {self._models()}{decoded}"
        return render("table.html", headings=headings, rows=rows, caption=caption)

    @property
    def caveat(self) -> str:
        """A sentence on intervals that are approximate; empty if none are."""
        return caveat(metric for result in self.results for metric in result.metrics.values())

    def _decode(self) -> str:
        """Return the rule by which image files were decoded; empty if unknown."""
        rules = (result.provenance.evidence.get("decode") for result in self.results)
        return ", ".join(dict.fromkeys(filter(None, rules)))

    def _models(self) -> str:
        return ", ".join(dict.fromkeys(result.provenance.model for result in self.results))


def _cells(metric: Metric) -> tuple[str, str]:
    return f"{metric.low:.1%} – {metric.high:.1%}", f"{metric.n:,}"


def evaluate(model: Encoder, tasks: Iterable[Task]) -> Report:
    """Measure a model on every task.

    Raises:
        ConfigError: no tasks, or two of one name.

    Example:
        >>> task = vlm.RetrievalTask(pictures, ["red", "green", "blue"], vlm.DataInfo("colours"))
        >>> report = vlm.evaluation.evaluate(model, [task])
        >>> len(report.results)
        1
    """
    tasks = list(tasks)
    names = [task.name for task in tasks]
    if not tasks:
        raise ConfigError("there are no tasks: give at least one")
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two tasks are called {name!r}: give each a `name` of its own")
    return Report(tuple(measure(model, task) for task in tasks))


def measure(model: Encoder, task: Task) -> Result:
    """Measure one task, with its samples."""
    start = time.perf_counter()
    measured = task.measure(model)
    seconds = time.perf_counter() - start
    evidence = {
        "data_hash": measured.data_hash,
        "texts_hash": measured.texts_hash,
        **model_facts(model),
    }
    evidence |= getattr(task, "about", {})
    origin = provenance(model.name, task.data, task.templates, seconds, evidence)
    return Result(task.name, measured.metrics, origin, task.kind, measured.samples)


def provenance(
    model: str,
    data: DataInfo,
    templates: Sequence[str] = ("{}",),
    seconds: float = 0.0,
    evidence: dict[str, str] | None = None,
) -> Provenance:
    """Make the provenance of a measurement in this process."""
    import jax

    devices = jax.devices()
    versions = {"vlm": __version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    return Provenance(
        model=model,
        data=data,
        templates=tuple(templates),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
        device=f"{len(devices)} x {devices[0].device_kind}",
        versions=versions,
        evidence=evidence or {},
    )


def _metric(values: dict[str, Any]) -> Metric:
    names = ("value", "low", "high")  # null in JSON if not finite
    numbers = {name: math.nan if values[name] is None else values[name] for name in names}
    return Metric(**numbers, n=values["n"])


def _result(values: dict[str, Any]) -> Result:
    origin = values["provenance"]
    return Result(
        task=values["task"],
        metrics={name: _metric(metric) for name, metric in values["metrics"].items()},
        kind=values.get("kind", ""),
        provenance=Provenance(
            **{
                **origin,
                "data": DataInfo(**origin["data"]),
                "templates": tuple(origin["templates"]),
            }
        ),
    )
