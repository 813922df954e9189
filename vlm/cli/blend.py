"""`vlm blend`: average the weights of models, and measure the blend at every alpha."""

from typing import Annotated, Any

from tyro.conf import arg

from vlm.cli import options, runtime
from vlm.cli.parse import UsageError


def blend(
    models: Annotated[tuple[str, ...], arg(metavar="MODEL MODEL... OUT")],
    /,
    alpha: float = 0.5,
    tasks: Annotated[str | None, arg(metavar="NAME=TASK,...")] = None,
    greedy: Annotated[str | None, arg(metavar="TASK")] = None,
) -> None:
    """Average the weights of models, and write a folder with the result.

    Two models are interpolated (WiSE-FT): alpha times the second, which is the fine-tuned one, plus
    1 - alpha times the first. Three or more are averaged evenly, or chosen by --greedy (model
    soups).

    Examples:
      vlm blend ViT-B-32 runs/fine-tuned blended --alpha 0.5
      vlm blend ViT-B-32 runs/fine-tuned blended --tasks in=folder:mine/test,out=tfds:cifar10
      vlm blend runs/a runs/b runs/c soup --greedy folder:mine/validation

    Args:
        models: two or more models, then the output folder, which must not exist.
        alpha: weight of the second of two models, from 0 to 1.
        tasks: measure the blend at every alpha on these tasks, by name; tasks are as in `vlm eval`.
            The chart is in report.html in the output folder.
        greedy: a validation task: add models from the best down, each if it improves the result.
    """
    *names, out = models or ("",)
    if len(names) < 2:
        raise UsageError("vlm blend needs at least two models and then the output folder")
    folder = options.new_folder(out)
    if len(names) > 2 and tasks is not None:
        raise UsageError("--tasks interpolates between two models: give two")
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
    """Parse `in=folder:a,out=tfds:b` to tasks by name."""
    found: dict[str, str] = {}
    for part in (tasks or "").split(",") if tasks else ():
        name, equals, task = part.partition("=")
        if not (equals and name.strip() and task.strip()) or name.strip() in found:
            raise UsageError(
                f"--tasks has {part!r}: give each task its own name, such as "
                "in=folder:mine/test,out=tfds:cifar10"
            )
        found[name.strip()] = task.strip()
    return found


def _open(name: str) -> Any:
    from vlm.errors import ConfigError, DataError
    from vlm.evaluation.suites import Missing, expand, open_task

    try:
        one, *more = expand((name,))
    except ConfigError as error:
        raise UsageError(str(error)) from None
    if more:
        raise UsageError(f"{name} is a suite of several tasks: name one of {', '.join(more)}")
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
