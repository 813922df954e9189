"""Choice of prompt templates, by one rule for all commands."""

from collections.abc import Mapping, Sequence

from vlm.errors import ConfigError
from vlm.heads.labels import read_templates
from vlm.heads.prompts import TEMPLATES, check_templates


def choose_templates(
    given: Sequence[str] | None = None, model: object = None, source: object = None
) -> tuple[str, ...]:
    """Choose the given templates, else the model's, else the data set's, else "photo".

    Args:
        given: sentences with `{}`; or a single item that is the name of a set in `TEMPLATES`, or a
            source for `read_templates`.
        model: may have `templates`, as a model trained on labelled data has.
        source: a data set, which may have `templates`.

    Raises:
        ConfigError: a template without `{}`.
        DataError: a file of templates that cannot be read.

    Example:
        >>> from vlm.heads.templates import choose_templates
        >>> choose_templates(["a drawing of a {}."]), choose_templates()
        (('a drawing of a {}.',), ('a photo of a {}.',))
    """
    if given and len(given) == 1:
        given = TEMPLATES.get(given[0]) or _read(given[0])
    own = (getattr(one, "templates", None) for one in (model, source))
    by_default = next((templates for templates in own if templates), TEMPLATES["photo"])
    chosen = by_default if given is None else given
    check_templates(chosen)
    return tuple(chosen)


def _read(text: str) -> Sequence[str]:
    """Return a single template as a list, or read the templates of a source."""
    templates = read_templates(text) if is_place(text) else [text]
    if isinstance(templates, Mapping):
        raise ConfigError(
            f"{text} has sentences for each label: give it as the labels (--labels-file)"
        )
    return templates


def is_place(text: str) -> bool:
    """Whether a text names a JSON file or data set of labels or templates."""
    return text.startswith(("tfds:", "open_clip:")) or ".json" in text


def describe_templates(templates: Sequence[str]) -> str:
    """Summarize templates: the name of their set, or their number and the first one.

    Example:
        >>> from vlm.heads.templates import describe_templates
        >>> describe_templates(["a photo of a {}."]), describe_templates(["a {}", "the {}"])
        ("photo ('a photo of a {}.')", "2 templates ('a {}' first)")
    """
    first = repr(templates[0])
    name = next((name for name, own in TEMPLATES.items() if own == tuple(templates)), None)
    if len(templates) == 1:
        return f"{name} ({first})" if name else first
    return f"{name} ({len(templates)})" if name else f"{len(templates)} templates ({first} first)"
