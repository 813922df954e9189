"""`vlm eval`: evaluate a model on held-out data."""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from vlm.cli import parse, runtime
from vlm.cli.commands import COMMON, UsageError
from vlm.cli.help import Page, of_config
from vlm.cli.options import MODEL_HELP
from vlm.cli.runs import classifier_of, experiment_of
from vlm.cli.signatures import Option
from vlm.config import DataConfig, find_codes
from vlm.data.splits import WHOLE, find_split

ABOUT = """\
Evaluate a model on held-out data: zero-shot accuracy over all captions, and retrieval in both
directions, with 95% confidence intervals.

A run is evaluated on its own data, with its trained head if it has objective classification. Any
other model needs --data.source. Without --data.eval-split the test split is used, else the
validation split; data without splits is used completely, as [all].

Class labels are made readable for prompts, or named by a file: --class-names FILE. The templates
are those of --templates, else the model's own, else those of the data set, else "a photo of a {}.".
The table names them.

--tasks selects other data: tfds:NAME, folder:PATH (a folder for each class), wds:FOLDER (in the
format of CLIP_benchmark), retrieval:NAME, winoground, or a suite: imagenet, imagenetv2,
imagenet_sketch, imagenet-a, imagenet-r, vtab, datacomp38, flickr30k, coco, sugarcrepe. Data is read
from --data.data-dir (the files of Winoground and SugarCrepe from folders of these names in it).
Missing data is reported and skipped; nothing is downloaded.

With several processes, such as one on each host, each embeds a part, and the first one prints and
writes. They are detected as by `vlm train`.

Examples:
  vlm eval runs/openmoji
  vlm eval ViT-B-32 --data.source tfds:cifar10 --data.label label
  vlm eval ViT-B-32 --data.source pets/ --data.label label --split val --templates clip_best
  vlm eval ViT-B-32 --tasks tfds:cifar10,retrieval:coco_captions --out results/
  vlm eval ViT-B-32 --tasks wds:wds_food101 --decode reference
  vlm eval runs/openmoji --tasks zero-shot --out results.json"""

OWN = ("zero-shot", "retrieval")  # tasks on the data of --data
_ALIASES = {
    "--class-names": "--data.class-names",
    "--templates": "--data.templates",
    "--split": "--data.eval-split",
}


@dataclass(frozen=True)
class Options:
    """Options of `vlm eval`.

    Args:
        tasks: Tasks to measure: zero-shot, retrieval, or other data by name, such as tfds:cifar10.
            Default: both; for data with a label, zero-shot.
        decode: Conversion of image files to RGB. intended: upright by EXIF orientation, transparent
            pixels on a background; reference: Pillow's Image.open(file).convert("RGB"), as for
            published figures. Default: that of the model, else intended.
        prompt: Name of the model's prompt to put before all texts. Default: the model's own.
        json: Print JSON on stdout in place of a table.
        out: Write results to this .json file or folder. A folder gets a page, and for each task a
            file in CLIP_benchmark's format and a Parquet file of all queries. Finished tasks in it
            are not repeated.
    """

    data: DataConfig
    tasks: tuple[str, ...] = ()
    decode: Literal["intended", "reference"] | None = None
    prompt: str | None = None
    json: bool = False
    out: str | None = None


def help_page(options: Options | None = None) -> Page:
    """Return the help of `vlm eval`, with the values of `options` as defaults."""
    return of_config(
        options or Options(DataConfig(eval_split=None)),
        "vlm eval",
        ABOUT,
        usage=("vlm eval MODEL [options]",),
        more=(Option("MODEL", "", MODEL_HELP, part="Arguments"),),
        common=COMMON["eval"],
        aliases=_ALIASES,
    )


def main(args: list[str]) -> None:
    if not args or args[0].startswith("-"):
        if parse.asks_for_help(args[:1]):
            parse.print_help(args, help_page)
        raise UsageError("the model comes first: vlm eval MODEL [--data.source NAME] ...")
    model, *rest = args
    run = experiment_of(model)
    named = any(arg.split("=")[0] in ("--data.source", "--tasks") for arg in rest)
    if run is None and not named and not parse.asks_for_help(rest):
        raise UsageError(
            f"{model} is not a run folder: give the data to evaluate on with --data.source NAME, "
            "such as openmoji or tfds:cifar10"
        )
    if run is not None and any(find_codes(run.data)):
        if not named:  # a folder from elsewhere could name any code
            raise UsageError(
                f"{model} was trained on {run.data.source}, and vlm eval runs no code that a "
                "folder names: give the data with --data.source"
            )
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, source="", mixture=()))
    rest = [_full_name(arg) for arg in rest]
    default = Options(DataConfig(eval_split=None) if run is None else run.data)
    options = parse.options(default, "vlm eval", rest, help_page)
    if run is not None and not options.data.eval_split and options.data.source == run.data.source:
        raise UsageError(
            f"the run has no held-out split of {run.data.source}, and accuracy on training data is "
            "not meaningful: set --data.eval-split"
        )
    if not set(options.tasks) <= set(OWN):  # other data: without the run's settings
        given = {arg.split("=")[0] for arg in rest}
        own: dict[str, Any] = {"eval_split": None, "class_names": None, "templates": ()}
        own = {n: v for n, v in own.items() if f"--data.{n.replace('_', '-')}" not in given}
        options = dataclasses.replace(options, data=dataclasses.replace(options.data, **own))
    evaluate(model, options)


def _full_name(arg: str) -> str:
    """Expand an alias such as --templates to --data.templates."""
    name, equals, value = arg.partition("=")
    return f"{_ALIASES.get(name, name)}{equals}{value}"


def evaluate(model: str, options: Options) -> None:
    """Evaluate a model, and print the report."""
    runtime.prepare_inference()
    import jax
    from rich.console import Console

    from vlm.cluster import processes
    from vlm.evaluation.distributed import distributed
    from vlm.evaluation.runner import evaluate as run_tasks

    processes.start()
    with processes.stop_all_on_failure():
        if set(options.tasks) <= set(OWN):
            bundle = _load(model, options)
            task_list = tasks(options, trained_head(model, bundle, options), bundle)
            report = run_tasks(distributed(bundle), task_list)
            if jax.process_index() == 0:
                _write(options.out, report)
        else:
            report = _run_named(model, options)
    if jax.process_index() != 0:
        return
    if options.json:
        print(report.to_json())
    else:
        Console().print(report)


def _write(out: str | None, report: Any) -> None:
    """Write the report as a .json file, or as a folder of results."""
    from vlm.evaluation.results_folder import write_result

    if out and out.endswith(".json"):
        report.save(out)
    elif out:
        for result in report.results:
            write_result(out, result)
        _finish(out, report)


def _load(model: str, options: Options) -> Any:
    """Load the model with the options for its inputs."""
    from vlm.bundle import load

    bundle = load(model, decode=options.decode)
    return bundle if options.prompt is None else bundle.with_prompt(options.prompt)


def _run_named(model: str, options: Options) -> Any:
    """Evaluate tasks and suites by name; results of finished tasks are read from the folder."""
    import jax

    from vlm.cli.terminal import print_status
    from vlm.cluster.processes import broadcast_text, exchange_texts
    from vlm.errors import ConfigError, DataError
    from vlm.evaluation.distributed import distributed
    from vlm.evaluation.evidence import model_facts
    from vlm.evaluation.results_folder import read_result, write_gallery, write_result
    from vlm.evaluation.runner import Report, measure
    from vlm.evaluation.suites import Missing, expand, open_task

    try:
        names = expand(options.tasks)
    except ConfigError as error:
        raise UsageError(str(error)) from None
    first = jax.process_index() == 0
    folder = options.out if options.out and not options.out.endswith(".json") else None
    bundle, results = _load(model, options), []
    facts = model_facts(bundle)
    data = options.data
    for name in names:
        task = open_task(
            name,
            data.data_dir,
            data.eval_split,
            model=bundle,
            templates=data.templates,
            class_names=data.class_names,
        )
        done = read_result(folder, name) if folder and first else None
        if done is not None and not facts.items() <= done.provenance.evidence.items():
            done = None  # other weights or other preprocessing
        if done is not None and not isinstance(task, Missing) and not _same(done, task):
            done = None
        if broadcast_text("" if done is None else "done"):
            results.append(done)
            continue
        missing = exchange_texts(task.why if isinstance(task, Missing) else "")
        if isinstance(task, Missing) or any(missing):
            if first:
                print_status(f"left out {name}: {next(filter(None, missing))}")
            continue
        results.append(measure(distributed(bundle), task))
        if folder and first:
            write_gallery(folder, results[-1], task)
            write_result(folder, results[-1])
    if not results:
        raise DataError(f"none of the tasks {', '.join(names)} can be measured here: see above")
    report = Report(tuple(results))
    if folder and first:
        _finish(folder, report)
    elif options.out and first:
        report.save(options.out)
    return report


def _same(done: Any, task: Any) -> bool:
    """Whether a result has the task's split, templates and class names."""
    origin = done.provenance
    texts = getattr(task, "texts_hash", origin.evidence.get("texts_hash"))
    found = origin.data, origin.templates, origin.evidence.get("texts_hash")
    return found == (task.data, tuple(task.templates), texts)


def _finish(folder: str, report: Any) -> None:
    """Write the report of a folder of results, and its page."""
    from etils import epath

    from vlm.evaluation.results_folder import RESULTS, read_gallery
    from vlm.evaluation.results_page import write_page

    report.save(epath.Path(folder) / RESULTS)
    galleries = {result.task: read_gallery(folder, result.task) for result in report.results}
    write_page(epath.Path(folder) / "report.html", report, galleries=[galleries])


def trained_head(model: str, bundle: Any, options: Options) -> Any | None:
    """Load the classifier of a run, if its classes are those of the data."""
    from vlm.cli.terminal import print_status
    from vlm.data.sources import classes_of, open_to_measure
    from vlm.heads.zero_shot import ZeroShotClassifier

    file, run = classifier_of(model) if options.data.label else None, experiment_of(model)
    if file is None or (run is not None and run.objective != "classification"):
        return None  # FLYP's classifier is the texts of its classes
    classifier = ZeroShotClassifier.load(file, bundle)
    source, _ = open_to_measure(options.data, options.data.eval_split)
    labels = classes_of(options.data, source).labels
    if sorted(classifier.labels) != sorted(labels):
        print_status(f"the head in {file} has other classes: the labels are evaluated as texts")
        return None
    classifier.z_labels = classifier.z_labels[[classifier.labels.index(label) for label in labels]]
    classifier.labels = tuple(labels)
    return classifier


def tasks(options: Options, head: Any | None = None, model: Any = None) -> list[Any]:
    """Make the tasks on the evaluation split of the data, or on its default split.

    Args:
        head: a classifier of the data's classes, in their order, in place of templates.
        model: its templates are used unless the options name others.

    Raises:
        UsageError: retrieval on data with labels.
        DataError: there is no such split, or no split to evaluate on.
    """
    from vlm.data.sources import (
        all_captions,
        classes_of,
        first_captions,
        held_out,
        open_to_measure,
        targets_of,
    )
    from vlm.evaluation.tasks import DataInfo, RetrievalTask, ZeroShotTask
    from vlm.heads.templates import choose_templates

    data = options.data
    wanted = options.tasks or (("zero-shot",) if data.label else ("zero-shot", "retrieval"))
    if data.label and "retrieval" in wanted:
        raise UsageError("data with a label has no captions to retrieve: keep --tasks zero-shot")
    source, split = open_to_measure(data, data.eval_split)
    info = DataInfo(data.source, split=split)
    split = data.train_split if split == WHOLE else split
    captions_split = data.train_split if _has_split(data, data.train_split) else split
    data = dataclasses.replace(data, eval_split=split, train_split=captions_split)
    task_list: list[Any] = []
    if "zero-shot" in wanted and data.label:
        labels, names = classes_of(data, source)
        task_list.append(
            ZeroShotTask(
                _images(source, data, "zero-shot"),
                labels,
                targets_of(source, data, labels),
                info,
                choose_templates(data.templates or None, model, source),
                z_captions=None if head is None else head.z_labels,
                names=names,
            )
        )
    elif "zero-shot" in wanted:
        images = _images(source, data, "zero-shot")
        task_list.append(ZeroShotTask(images, all_captions(data), held_out(data), info))
    if "retrieval" in wanted:
        texts = first_captions(source, data)
        task_list.append(RetrievalTask(_images(source, data, "retrieval"), texts, info))
    return task_list


def _has_split(data: DataConfig, split: str) -> bool:
    """Whether the data has a split such as train or train[:10%]+val."""
    from vlm.data.sources import split_names
    from vlm.errors import DataError

    known = split_names(data)
    try:
        return known is None or bool(find_split(re.split(r"[+\[]", split)[0], known, data.source))
    except DataError:
        return False


def _images(source: Any, data: DataConfig, what: str) -> Iterator[Any]:
    from vlm.cli.terminal import progress

    images = (source[i][data.image] for i in range(len(source)))
    return progress(images, what, len(source))
