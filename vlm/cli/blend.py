"""`vlm blend`: models averaged weight by weight, with the picture of what each share is worth."""

from typing import Annotated, Any

from tyro.conf import arg

from vlm.cli import parse, runtime
from vlm.cli.parse import UsageError
from vlm.paths import as_path


def main(args: list[str]) -> None:
    parse.call(blend, "vlm blend", args)


def blend(
    models: Annotated[tuple[str, ...], arg(metavar="MODEL MODEL... OUT")],
    /,
    alpha: float = 0.5,
    tasks: Annotated[str | None, arg(metavar="NAME=TASK,...")] = None,
    greedy: Annotated[str | None, arg(metavar="TASK")] = None,
) -> None:
    """Average models weight by weight, into a folder with the blend and, of tasks, a page.

    Two models are blended: a share of alpha of the second, the fine-tuned one, and the rest of the
    first (WiSE-FT). Three or more are averaged evenly, or by --greedy those that help (soups).

    Examples:
      vlm blend ViT-B-32/ runs/fine-tuned blended --alpha 0.5
      vlm blend ViT-B-32/ runs/fine-tuned blended --tasks in=folder:mine/test,out=tfds:cifar10
      vlm blend runs/a runs/b runs/c soup --greedy folder:mine/validation

    Args:
        models: two or more models, and then the folder to write, which is not there yet.
        alpha: the share of the second of two models, from 0 to 1.
        tasks: what to measure blends of every alpha on, by name; tasks are as in `vlm eval`. The
            picture goes to report.html in the folder.
        greedy: a validation task: from the best model down, each goes in if that helps.
    """
    *names, out = models or ("",)
    if len(names) < 2:
        raise UsageError("vlm blend takes at least two models and then the folder to write")
    folder = as_path(out)
    if folder.exists():
        raise UsageError(f"{out!r} is there already: name a folder that is not")
    if len(names) > 2 and tasks is not None:
        raise UsageError("--tasks draws what lies between two models: give two")
    wanted = _named(tasks)
    runtime.prepare_inference()
    from vlm.adaptation.blending import blend as blend_models
    from vlm.adaptation.blending import soup
    from vlm.bundle import load
    from vlm.cli.terminal import print_status

    measured = {name: _open(task) for name, task in wanted.items()}
    judge = None if greedy is None else _open(greedy)
    loaded = [load(name) for name in names]
    if len(loaded) == 2 and judge is None:
        made = blend_models(loaded[0], loaded[1], alpha)
    else:
        made = soup(loaded, judge)
    folder.mkdir(parents=True)
    made.save(folder / "bundle")
    if measured:
        _sweep(loaded, measured, alpha, folder)
    print_status(f"{made.name} in {out}")


def _named(tasks: str | None) -> dict[str, str]:
    """The tasks of `in=folder:a,out=tfds:b`, by name."""
    found: dict[str, str] = {}
    for part in (tasks or "").split(",") if tasks else ():
        name, equals, task = part.partition("=")
        if not (equals and name.strip() and task.strip()) or name.strip() in found:
            raise UsageError(
                f"--tasks has {part!r}: give each task a name of its own, such as "
                "in=folder:mine/test,out=tfds:cifar10"
            )
        found[name.strip()] = task.strip()
    return found


def _open(name: str) -> Any:
    from vlm.errors import ConfigError, DataError
    from vlm.evaluation.suites import Missing, expand, open_task

    try:
        one, *others = expand((name,))
    except ConfigError as error:
        raise UsageError(str(error)) from None
    if others:
        raise UsageError(f"{name} is a suite of several tasks: name one of {', '.join(others)}")
    task = open_task(one)
    if isinstance(task, Missing):
        raise DataError(f"{name} cannot be measured: {task.why}")
    return task


def _sweep(models: list[Any], tasks: dict[str, Any], alpha: float, folder: Any) -> None:
    """Measure blends of all alphas, print a table, and write the page."""
    from rich.console import Console
    from rich.table import Table

    from vlm.adaptation.sweep import sweep_alpha

    sweep = sweep_alpha(models[0], models[1], tasks)
    table = Table(*sweep.headings)
    for row in sweep.rows:
        table.add_row(*row)
    Console().print(table)
    first, second = (model.name for model in models)
    lead = f"{first} at alpha 0, {second} at alpha 1; the saved model is at alpha {alpha:g}."
    sweep.write_page(folder / "report.html", lead)
