"""`vlm eval`: what a model scores on held-out data."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from vlm.cli import parse, runtime
from vlm.cli.parse import UsageError
from vlm.cli.runs import experiment_of
from vlm.config import DataConfig

ABOUT = """\
Measure a model on held-out data: zero-shot accuracy over all captions, and retrieval in both
directions, each with its 95% interval.

A run is measured on the data it was trained for. Any other model needs --data.source.

Examples:
  vlm eval runs/openmoji
  vlm eval ViT-B-32/ --data.source tfds:cifar10 --data.label label
  vlm eval runs/openmoji --tasks zero-shot --out results.json"""

Task = Literal["zero-shot", "retrieval"]


@dataclass(frozen=True)
class Options:
    """What to measure, and on what."""

    data: DataConfig
    tasks: tuple[Task, ...] = ()  # by default both; of data with a label, zero-shot alone
    json: bool = False  # print the report as JSON instead of a table
    out: str | None = None  # a file for the report as JSON


def main(args: list[str]) -> None:
    if not args or args[0].startswith("-"):
        if args and args[0] in ("-h", "--help"):
            parse.options(Options(DataConfig()), "vlm eval MODEL", args, ABOUT)
        raise UsageError("the model comes first: vlm eval MODEL [--data.source NAME] ...")
    model, *rest = args
    run = experiment_of(model)
    named = any(arg.split("=")[0] == "--data.source" for arg in rest)
    if run is None and not named and not {"-h", "--help"} & set(rest):
        raise UsageError(
            f"{model} is no run of vlm, so say what to measure it on: --data.source NAME, such as "
            "openmoji or tfds:cifar10"
        )
    default = Options(DataConfig() if run is None else run.data)
    evaluate(model, parse.options(default, "vlm eval MODEL", rest, ABOUT))


def evaluate(model: str, options: Options) -> None:
    """Measure the model that `vlm.load` finds, and print the report."""
    runtime.prepare_inference()
    from rich.console import Console

    from vlm.bundle import load
    from vlm.evaluate.runner import evaluate as run_tasks

    report = run_tasks(load(model), tasks(options))
    if options.out:
        report.save(options.out)
    if options.json:
        print(report.to_json())
    else:
        Console().print(report)


def tasks(options: Options) -> list[Any]:
    """The tasks over the evaluation split of the data.

    Raises:
        UsageError: no evaluation split, or retrieval of data that has labels and no captions.
    """
    from vlm.data.sources import all_captions, first_captions, held_out, open_source
    from vlm.evaluate.tasks import DataInfo, RetrievalTask, ZeroShotTask

    data = options.data
    if not data.eval_split:
        raise UsageError("the data names no split to measure on: set --data.eval-split")
    wanted = options.tasks or (("zero-shot",) if data.label else ("zero-shot", "retrieval"))
    if data.label and "retrieval" in wanted:
        raise UsageError("data with a label has no captions to retrieve: keep --tasks zero-shot")
    source = open_source(data, data.eval_split)
    info = DataInfo(data.source, split=data.eval_split)
    made: list[Any] = []
    if "zero-shot" in wanted:
        plain = data
        if data.label:  # the bare names: the task itself fills them into every template
            plain = dataclasses.replace(data, templates=("{}",))
        made.append(
            ZeroShotTask(
                _images(source, data, "zero-shot"),
                all_captions(plain),
                held_out(plain),
                info,
                data.templates if data.label else ("{}",),
            )
        )
    if "retrieval" in wanted:
        texts = first_captions(source, data)
        made.append(RetrievalTask(_images(source, data, "retrieval"), texts, info))
    return made


def _images(source: Any, data: DataConfig, what: str) -> Iterator[Any]:
    from vlm.cli.terminal import progress

    images = (source[i][data.image] for i in range(len(source)))
    return progress(images, what, len(source))
