"""`vlm adapt`: a model made good at labelled images, by what fits into a budget of time."""

import re
from typing import Annotated

from tyro.conf import arg

from vlm.cli import parse, runtime
from vlm.cli.parse import UsageError
from vlm.paths import as_path

UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def main(args: list[str]) -> None:
    parse.call(adapt, "vlm adapt", args)


def adapt(
    model: Annotated[str, arg(metavar="MODEL")],
    data: Annotated[str, arg(metavar="DATA")],
    /,
    out: Annotated[str, arg(metavar="FOLDER")] = "adapted",
    budget: Annotated[str, arg(metavar="TIME")] = "5m",
    method: Annotated[tuple[str, ...], arg(metavar="METHODS...")] = (),
    teacher: Annotated[str | None, arg(metavar="MODEL")] = None,
    test: Annotated[str | None, arg(metavar="DATA")] = None,
    out_of_distribution: Annotated[str | None, arg(metavar="DATA")] = None,
    templates: Annotated[tuple[str, ...], arg(metavar="TEMPLATES...")] = (),
    class_names: Annotated[str | None, arg(metavar="FILE")] = None,
    shots: int | None = None,
    seed: int = 0,
) -> None:
    """Adapt a model to labelled images: try what fits into a budget, choose, measure, and tell.

    A fifth of each class is held out, and the method that is best there is kept. Copies of an image
    stay on one side. DATA is a folder
    with a folder for each class, tfds:NAME, folder:PATH or wds:SHARDS. The folder that is written
    holds the model, which every command takes, a classifier, which vlm classify uses by itself, and
    the page report.html.

    Examples:
      vlm adapt ViT-B-32/ pets/ --budget 5m --out pets-model
      vlm adapt ViT-B-32/ pets/train --test pets/test --out-of-distribution tfds:cifar10
      vlm adapt runs/openmoji mine/ --method probe prompt --budget 60s
      vlm adapt ViT-B-32/ pets/ --method distill --teacher ViT-L-14/ --budget 1h
      vlm classify pets-model photo.jpg

    Args:
        model: a run folder, a bundle, or a public checkpoint.
        data: the labelled images; of a data set with splits, its training split.
        out: a folder that is not there yet.
        budget: for all tries together, such as 90s, 5m or 1h; measuring on other data comes on top.
        method: what to try, by default all that fits: probe, tip, prompt, lora, full, distill,
            blend.
        teacher: a larger model, which distill learns from.
        test: labelled images of the same classes, to measure on.
        out_of_distribution: labelled images of another kind, to measure what is kept.
        templates: sentences in which {} stands for the label, or the name of a set: plain, photo,
            clip_best, siglip. By default the model's own, as of a run, else those of the data set,
            else "a photo of a {}.".
        class_names: a file with the names of the labels, which are made readable without: a line
            for each in their order, lines LABEL<tab>NAME, or JSON.
        shots: learn from and choose by at most so many images of a class.
        seed: of the images held out, and of all that is random.
    """
    folder = as_path(out)
    if folder.exists():
        raise UsageError(f"{out!r} is there already: name a folder that is not with --out")
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
    labelled = read_labelled(data, "train", class_names=class_names)
    if renamed := described(labelled.names, labelled.texts):
        print_status(renamed)
    if shots is not None:
        labelled = labelled.take(pick_shots(labelled, shots, seed))
    measured = None if test is None else read_labelled(test)
    shifted = None if out_of_distribution is None else read_labelled(out_of_distribution)
    made = adapt_model(
        load(model),
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
    made.save(Path(folder))
    Console().print(made)
    print(f"{made.chosen} is best on the images held out; it is in {out}")
    print_status(f"page {folder / 'report.html'}")


def _seconds(budget: str) -> float:
    """The seconds of 90s, 5m or 1h.

    Raises:
        UsageError: another form, or no time at all.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", budget.strip())
    seconds = float(found[1]) * UNITS[found[2]] if found else 0.0
    if not seconds > 0:
        raise UsageError(f"--budget {budget!r} is no time: give one such as 90s, 5m or 1h")
    return seconds
