"""`vlm compare`: compare two evaluations on the same examples, with significance tests."""

from typing import Annotated

from tyro.conf import arg

from vlm.cli import options
from vlm.cli.parse import UsageError


def compare(
    a: Annotated[str, arg(metavar="A")],
    b: Annotated[str, arg(metavar="B")],
    /,
    json: options.Json = False,
    out: Annotated[str | None, arg(metavar="FILE.html")] = None,
) -> None:
    """Compare two evaluations example by example. A and B are folders of vlm eval --out.

    For each task in both: the difference with its paired 95% confidence interval, McNemar's test,
    the examples that only one of the two gets right, and the smallest difference that the data can
    detect. Results on different data are refused.

    Examples:
      vlm eval MODEL-A --tasks tfds:cifar10 --out a/
      vlm eval MODEL-B --tasks tfds:cifar10 --out b/
      vlm compare a/ b/ --out comparison.html

    Args:
        a: a folder of results.
        b: the folder to compare it with.
        out: write an HTML page with both side by side.
    """
    from rich.console import Console

    from vlm.evaluation.comparison import as_json, as_table
    from vlm.evaluation.comparison import compare as compare_results
    from vlm.evaluation.results_folder import read_gallery, read_report
    from vlm.evaluation.results_page import write_page

    if out and not out.endswith(".html"):
        raise UsageError(f"--out {out!r} is not an HTML page: give a name that ends in .html")
    one, other = read_report(a), read_report(b)
    names = [result.task for result in other.results]
    both = [result for result in one.results if result.task in names]
    if not both:
        raise UsageError(
            f"{a} has the tasks {', '.join(r.task for r in one.results)} and {b} has "
            f"{', '.join(names)}: evaluate both models on the same tasks"
        )
    comparisons = [c for result in both for c in compare_results(result, other[result.task])]
    if out:
        galleries = [{r.task: read_gallery(place, r.task) for r in both} for place in (a, b)]
        write_page(out, one, other, comparisons, galleries)
    if json:
        print(as_json(comparisons))
    else:
        models = [report.results[0].provenance.model for report in (one, other)]
        Console().print(as_table(comparisons, *models))
