"""Pages from the Jinja templates of the package, such as `vlm/evaluation/results.html`."""

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


def render(template: str, **values: Any) -> "Markup":
    """Fill in a template, given by its path below `vlm/`, such as "evaluation/results.html".

    HTML and SVG templates escape values, except those that `render` returned. The filter `number`
    formats as Python does: `{{ 0.5|number(".1%") }}`.

    Raises:
        jinja2.UndefinedError: the template uses a value that is not given.
    """
    from markupsafe import Markup

    return Markup(_environment().get_template(template).render(values))


@functools.cache
def _environment() -> "Environment":
    import jinja2  # not at the top: it takes a while to import

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlm", ""),
        autoescape=lambda name: name is not None and name.endswith((".html", ".svg")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": format, "repr": repr}
    return environment
