"""Split and join parameter trees: trained parameters and the rest."""

from collections.abc import Callable
from typing import Any

Params = dict[Any, Any]  # nested, by name; list items by index


def partition(
    params: Params, trained: Callable[[tuple[str, ...]], bool], path: tuple[str, ...] = ()
) -> tuple[Params, Params]:
    """Return (leaves whose path is `trained`, all other leaves), without empty branches."""
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
    """Return the union of two trees; where both have a leaf, that of `one`."""
    tree = dict(other)
    for name, value in one.items():
        both = isinstance(value, dict) and isinstance(other.get(name), dict)
        tree[name] = joined(value, other[name]) if both else value
    return tree
