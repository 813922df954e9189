"""Trees of parameters in two parts: what is trained, and the rest."""

from collections.abc import Callable
from typing import Any

Params = dict[Any, Any]  # nested, by name; an item of a list by its number


def partition(
    params: Params, trained: Callable[[tuple[str, ...]], bool], path: tuple[str, ...] = ()
) -> tuple[Params, Params]:
    """(what `trained` says yes to by its path, the rest); without branches that would be empty."""
    yes, no = {}, {}
    for name, value in params.items():
        here = (*path, str(name))
        if isinstance(value, dict):
            for side, part in zip((yes, no), partition(value, trained, here), strict=True):
                if part:
                    side[name] = part
        else:
            (yes if trained(here) else no)[name] = value
    return yes, no


def joined(one: Params, other: Params) -> Params:
    """The tree of both parts; where both have a leaf, that of `one`."""
    tree = dict(other)
    for name, value in one.items():
        both = isinstance(value, dict) and isinstance(other.get(name), dict)
        tree[name] = joined(value, other[name]) if both else value
    return tree
