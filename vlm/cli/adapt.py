"""`vlm adapt`: fine-tune a model on labelled images within a time budget."""

import re
from typing import Annotated

from tyro.conf import arg

from vlm.cli import options, runtime
from vlm.cli.model import leading_model, load_model
from vlm.cli.parse import UsageError

UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def adapt(
    data: Annotated[tuple[str, ...], arg(metavar="DATA")],
    /,
    model: options.ModelOption = None,
    out: Annotated[str, arg(metavar="FOLDER")] = "adapted",
    budget: Annotated[str, arg(metavar="TIME")] = "5m",
    method: Annotated[tuple[str, ...], arg(metavar="METHODS...")] = (),
    teacher: Annotated[str | None, arg(metavar="MODEL")] = None,
    test: Annotated[str | None, arg(metavar="DATA")] = None,
    out_of_distribution: Annotated[str | None, arg(metavar="DATA")] = None,
    templates: options.Templates = (),
    class_names: options.ClassNames = None,
    shots: int | None = None,
    seed: int = 0,
) -> None:
    """Fine-tune a model on labelled images within a time budget, and keep the best method.

    A fifth of each class is the validation split; copies of an image are in one split. DATA is a
    folder with a folder for each class, tfds:NAME, folder:PATH or wds:SHARDS. The output folder
    holds the model, which every command accepts, a classifier, which vlm classify uses by default,
    and the page report.html.

    Examples:
      vlm adapt pets/ --budget 5m --out pets-model
      vlm adapt pets/train --model ViT-B-32 --test pets/test --out-of-distribution tfds:cifar10
      vlm adapt mine/ --model runs/openmoji --method probe prompt --budget 60s
      vlm adapt pets/ --method distill --teacher ViT-L-14 --budget 1h
      vlm classify photo.jpg --model pets-model

    Args:
        data: the labelled images; of a data set with splits, its training split.
        out: output folder, which must not exist.
        budget: time for all methods together, such as 90s, 5m or 1h. It excludes measuring on
            --test and --out-of-distribution.
        method: methods to try: probe, tip, prompt, lora, full, distill, blend. Default: all that
            fit into the budget.
        teacher: a larger model for distillation.
        test: labelled images of the same classes, to measure accuracy on.
        out_of_distribution: labelled images of another kind, to measure how much accuracy is kept.
        shots: use at most this many images of each class.
        seed: random seed of the validation split and of training.
    """
    model, places = leading_model("vlm adapt", model, data, most=1)
    if len(places) != 1:
        raise UsageError("vlm adapt needs one place of labelled images: vlm adapt DATA")
    folder = options.new_folder(out)
    seconds = _seconds(budget)
    wanted = tuple(name for part in method for name in part.split(",") if name)
    runtime.prepare_inference()
    from pathlib import Path

    from rich.console import Console

    from vlm.adaptation.budgeted import adapt as adapt_model
    from vlm.adaptation.labelled import pick_shots, read_labelled
    from vlm.adaptation.methods import METHODS
    from vlm.bundle import load
    from vlm.cli.terminal import print_status
    from vlm.data.class_names import described

    for name in wanted:
        if name not in METHODS:
            raise UsageError(f"there is no method {name!r}: choose from {', '.join(METHODS)}")
    labelled = read_labelled(places[0], "train", class_names=class_names)
    if renamed := described(labelled.names, labelled.texts):
        print_status(renamed)
    if shots is not None:
        labelled = labelled.take(pick_shots(labelled, shots, seed))
    measured = None if test is None else read_labelled(test)
    shifted = None if out_of_distribution is None else read_labelled(out_of_distribution)
    outcome = adapt_model(
        load_model(model),
        labelled,
        Path(folder) / "runs",
        seconds,
        wanted,
        templates or None,
        measured,
        shifted,
        seed,
        print_status,
        None if teacher is None else load(teacher),
    )
    outcome.save(Path(folder))
    Console().print(outcome)
    print(f"{outcome.chosen} is best on the validation images; it is in {out}")
    print_status(f"page {folder / 'report.html'}")
    print_status(f"use it: vlm classify photo.jpg --model {out}")


def _seconds(budget: str) -> float:
    """Convert 90s, 5m or 1h to seconds.

    Raises:
        UsageError: another form, or zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", budget.strip())
    seconds = float(match[1]) * UNITS[match[2]] if match else 0.0
    if not seconds > 0:
        raise UsageError(f"--budget {budget!r} is not a duration: give one such as 90s, 5m or 1h")
    return seconds
