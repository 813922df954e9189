"""Templates of the package: values are escaped, and a missing value is an error."""

from pathlib import Path

import jinja2
import pytest

import vlm
from vlm._html import _environment, render

PACKAGE = Path(vlm.__file__).parent


def test_values_are_escaped_and_rendered_parts_are_not():
    html = render("page.html", title="<b>", lead="a & b", footnotes=["'", ""])
    assert "<title>&lt;b&gt;</title>" in html
    assert "a &amp; b" in html
    assert html.count("<p>") == 1  # an empty footnote is left out
    nested = render("page.html", title="", lead=render("table.html", headings=["a"], rows=["b"]))
    assert "<td>b</td>" in nested


def test_a_missing_value_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="'title' is undefined"):
        render("page.html", lead="")


@pytest.mark.parametrize(
    "template",
    [
        str(path.relative_to(PACKAGE))
        for pattern in ("*.html", "*.svg", "*.jinja")
        for path in PACKAGE.rglob(pattern)
        if path.parent.name != "page"  # the search page of `vlm serve` is no template
    ],
)
def test_every_template_compiles(template):
    _environment().get_template(template)
